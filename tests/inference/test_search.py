"""clipft.embed, clipft.search, and their commands: values, interrupted runs, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scripts import Script
from tiny_clip import captioned, class_folders, picture, tiny_clip
from typer.testing import CliRunner

import clipft
from clipft.cli import app

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    model, processor = tiny_clip()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def onnx_base(exported: tuple[Path, Any]) -> Path:
    return exported[0]


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ok(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


# ---- embed ----


def test_pictures_and_texts_as_the_model_embeds_them(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    rows = captioned(7)
    with torch.no_grad():
        want = model(
            **processor(images=list(rows["image"]), text=list(rows["caption"]), return_tensors="pt", padding=True)
        )
    images = clipft.embed(model, processor, images=rows, batch_size=3)
    assert images.dtype == torch.float32 and images.shape == (7, 16)
    torch.testing.assert_close(images, want.image_embeds, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        clipft.embed(model, processor, texts=rows["caption"][:]), want.text_embeds, atol=2e-6, rtol=0
    )
    rows[2]["image"].save(tmp_path / "a.png")
    for one in (rows[2]["image"], tmp_path / "a.png", str(tmp_path / "a.png")):
        torch.testing.assert_close(clipft.embed(model, processor, images=[one]), images[2:3])
    assert clipft.embed(model, processor, images=[]).shape == (0, 16)
    torch.testing.assert_close(clipft.embed(model, processor, images=rows, num_workers=1), images)


def test_onnx_embeds_the_same(onnx_base: Path) -> None:
    model, processor = tiny_clip()
    rows = captioned(5)
    clip = clipft.OnnxCLIP(onnx_base)
    for what in ({"images": rows}, {"texts": list(rows["caption"])}):
        torch.testing.assert_close(
            clipft.embed(clip, None, **what), clipft.embed(model, processor, **what), atol=2e-6, rtol=0
        )


def test_arguments_of_embed(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="images, texts: expected one of the two"):
        clipft.embed(model, processor)
    with pytest.raises(TypeError, match="texts: expected a list of strings, got str"):
        clipft.embed(model, processor, texts="a cat")
    with pytest.raises(TypeError, match="images: expected several pictures, paths or a data set, got Image"):
        clipft.embed(model, processor, images=picture(0)[0])
    with pytest.raises(ValueError, match=r"processor: expected the model's processor, as .* gives both, got None"):
        clipft.embed(model, images=[picture(0)[0]])
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"row 1: the image cannot be read"):
        clipft.embed(model, processor, images=[picture(0)[0], tmp_path / "bad.png"])


# ---- search ----


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_search_is_exact(kind: Any) -> None:
    rng = np.random.default_rng(0)
    index, queries = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    scores, indices = clipft.search(kind(index), kind(queries), 4)
    products = queries @ index.T
    order = np.argsort(-products, axis=1)[:, :4]
    assert indices.tolist() == order.tolist() and indices.dtype == torch.int64
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(products, order, 1), rtol=1e-5)
    assert clipft.search(kind(index[:2]), kind(queries), 9)[1].shape == (3, 2)


@pytest.mark.parametrize(
    "index, queries, k, message",
    [
        (np.ones((0, 3)), np.ones((1, 3)), 1, "index: expected at least one vector"),
        (np.ones((2, 3)), np.ones((1, 4)), 1, "queries: expected vectors of the index's 3 dimensions, got 4"),
        (np.ones((2, 3)), np.ones(3), 1, r"queries: expected vectors \[N, D\], got shape \[3\]"),
        (np.ones((2, 3)), np.full((1, 3), np.nan), 1, "queries: expected finite numbers"),
        (np.full((2, 3), np.inf), np.ones((1, 3)), 1, "index: expected finite numbers"),
        (np.ones((2, 3)), np.ones((1, 3)), 0, "k: expected an integer of at least 1, got 0"),
        (np.ones((2, 3)), np.ones((1, 3)), 1.5, "k: expected an integer of at least 1, got 1.5"),
    ],
)
def test_search_refuses(index: Any, queries: Any, k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipft.search(index, queries, k)


def test_without_faiss_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['faiss'] = None; import clipft; clipft.search([[1.0]], [[1.0]], 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: searching needs faiss: pip install 'clipft[search]'" in done.stderr


# ---- the commands ----


@pytest.mark.parametrize("ending", ["parquet", "npy"])
def test_a_folder_embedded_and_searched(ending: str, base: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"vectors.{ending}"
    assert "20 vectors in" in ok("embed", "--model", base, "--data", folder, "--output", file, "--batch-size", 3)
    own = {f"vectors.{ending}"} | ({"vectors.npy.json"} if ending == "npy" else set())
    assert {path.name for path in tmp_path.iterdir()} == own
    paths = sorted(path for path in folder.rglob("*.png"))
    want = clipft.embed(*clipft.load(base), images=paths)
    if ending == "parquet":
        table = pq.read_table(file)
        assert table.column("id").to_pylist() == [str(path.relative_to(folder)) for path in paths]
        got = torch.tensor(table.column("embedding").to_pylist())
    else:
        got = torch.from_numpy(np.load(file))
    torch.testing.assert_close(got, want)
    output = ok(
        "search", "--index", file, "--model", base, "--image", paths[7], "-k", 3, "--output", tmp_path / "s.png"
    )
    assert f"│ 1 │ 1.000 │ {paths[7].relative_to(folder)}" in output
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.format == "PNG" and sheet.width > sheet.height
    scores, indices = clipft.search(file, want[7:8], 2)
    assert indices[0, 0] == 7 and scores[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_a_table_and_texts(base: Path, tmp_path: Path) -> None:
    rows = []
    for index in range(6):
        picture(index)[0].save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "caption": f"{picture(index)[1]} {index}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    (tmp_path / "words.txt").write_text("a red square\n\na blue bar\n")
    ok("embed", "--model", base, "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").column("id").to_pylist() == [f"{n}.png" for n in range(6)]
    queries = ["--text", "a red square", "--text", "two", "-k", 2, "--output", tmp_path / "s.png"]
    output = ok("search", "--index", tmp_path / "a.parquet", "--model", base, *queries)
    assert "a red square" in output and "two" in output and (tmp_path / "s.png").stat().st_size > 5000
    ok("embed", "--model", base, "--texts", tmp_path / "words.txt", "--output", tmp_path / "t.parquet")
    output = ok("search", "--index", tmp_path / "t.parquet", "--model", base, "--text", "a blue bar", "-k", 1)
    assert "│ 1 │ 1.000 │ a blue bar" in output


@pytest.mark.parametrize(
    "given", [["--split", "test"], ["--on-bad-row", "skip"], ["--id-column", "name"], ["--allow-outside-paths"]]
)
def test_what_only_pictures_have_is_refused_for_texts(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a red square\n")
    texts = ["--texts", tmp_path / "words.txt", "--encoding", "latin-1", "--output", tmp_path / "t.parquet"]
    result = run("embed", "--model", "demo", *texts, *given)
    assert result.exit_code == 2 and f"error: {given[0]}: is about --data; --texts takes --encoding" in result.output


def test_onnx_backend(onnx_base: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.parquet"
    ok("embed", "--model", onnx_base, "--int8", "--data", folder, "--output", file)
    first = sorted(folder.rglob("*.png"))[0]
    assert "1.000" in ok("search", "--index", file, "--model", onnx_base, "--int8", "--image", first)
    other = run("search", "--index", file, "--model", onnx_base, "--image", first)
    assert other.exit_code == 2 and "--int8 chooses the encoders" in other.output


def test_a_model_with_other_weights_is_refused(base: Path, folder: Path, tmp_path: Path) -> None:
    ok("embed", "--model", base, "--data", folder, "--output", tmp_path / "v.parquet")
    model, processor = tiny_clip(seed=1)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    result = run("search", "--index", tmp_path / "v.parquet", "--model", tmp_path / "other", "--text", "x")
    assert result.exit_code == 2 and "whose weights or preprocessing differ from those of" in result.output


# ---- interruptions and faults ----

KILLED = """
import os, signal, sys
import clipft.cli.search, clipft.inference.encode, clipft.inference.vectors
from clipft.cli import app
clipft.inference.shards.SHARD = 4
load, calls = clipft.inference.encode.load_encoder, []
def dying(*args, **kwargs):
    encoder = load(*args, **kwargs)
    def images(pixels):
        calls.append(1)
        if len(calls) > int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return encoder.images(pixels)
    return clipft.inference.encode.Encoder(encoder.transform, images, encoder.texts, encoder.identity)
clipft.inference.encode.load_encoder = dying
app(sys.argv[2:], standalone_mode=False)
print("calls", len(calls))
"""


def test_an_interrupted_run_goes_on_where_it_was(base: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.npy"
    command = ["embed", "--model", str(base), "--data", str(folder), "--output", str(file), "--batch-size", "2"]

    def child(calls: int, *more: str) -> Any:
        return Script(KILLED, calls, *command, *more).finish()

    assert child(5).returncode == -9 and not file.exists()  # two shards of two batches, and one batch more
    assert {path.name for path in tmp_path.iterdir()} == {".v.npy.parts"}
    assert {path.name for path in (tmp_path / ".v.npy.parts").iterdir()} == {"work.json", "000000.npy", "000001.npy"}
    model, processor = tiny_clip(seed=1)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    other = run(*command[:2], tmp_path / "other", *command[3:])
    assert other.exit_code == 2 and "an interrupted run is there, whose model and identity differ" in other.output
    done = child(100)
    assert "calls 6" in done.stdout, done.stderr  # 20 pictures: three shards were left
    assert {path.name for path in tmp_path.iterdir()} == {"v.npy", "v.npy.json", "other"}
    want = clipft.embed(*clipft.load(base), images=sorted(folder.rglob("*.png")))
    torch.testing.assert_close(torch.from_numpy(np.load(file)), want)
    assert child(1).returncode == -9
    assert "calls 10" in child(100, "--restart").stdout


def test_a_damaged_shard_is_named(base: Path, folder: Path, tmp_path: Path) -> None:
    command = ["embed", "--model", base, "--data", folder, "--output", tmp_path / "v.npy"]
    assert Script(KILLED, 5, *command, "--batch-size", 2).finish().returncode == -9
    (tmp_path / ".v.npy.parts" / "000000.npy").write_bytes(b"half")
    result = run(*command)
    assert result.exit_code == 2 and "000000.npy: damaged" in result.output and not (tmp_path / "v.npy").exists()


def test_unreadable_pictures(base: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "data", 6)
    bad = tmp_path / "data" / "red" / "zz.jpg"
    bad.write_bytes(b"not a picture")
    result = run("embed", "--model", base, "--data", tmp_path / "data", "--output", tmp_path / "v.parquet")
    assert result.exit_code == 2 and "red/zz.jpg: the image cannot be read" in result.output
    assert not (tmp_path / "v.parquet").exists()
    command = ["embed", "--model", base, "--data", tmp_path / "data", "--output", tmp_path / "v.parquet"]
    output = ok(*command, "--on-bad-row", "skip")
    assert "1 of 7 pictures cannot be read and were left out" in output
    ids = pq.read_table(tmp_path / "v.parquet").column("id").to_pylist()
    assert len(ids) == 6 and "red/zz.jpg" not in ids


def test_what_the_commands_refuse(base: Path, folder: Path, tmp_path: Path) -> None:
    def message(*arguments: Any) -> str:
        result = run(*arguments)
        assert result.exit_code == 2
        return " ".join(result.output.split())

    common = ["--model", base, "--output", tmp_path / "v.parquet"]
    assert "--data, --texts: expected one of the two" in message("embed", *common)
    assert "expected pictures in" in message("embed", *common, "--data", base)
    assert "a name that ends in .parquet or .npy" in message(
        "embed", "--model", base, "--data", folder, "--output", tmp_path / "v.bin"
    )
    assert "chooses between the encoders of an ONNX folder" in message("embed", *common, "--data", folder, "--int8")
    assert "there is no such file" in message("search", "--index", tmp_path / "no.npy", "--model", base, "--text", "x")
    assert "expected at least one query" in message("search", "--index", tmp_path / "no.npy", "--model", base)
    (tmp_path / "foreign.parquet").write_bytes(b"PAR1 and more")
    assert "expected a file that clipft embed wrote" in message(
        "search", "--index", tmp_path / "foreign.parquet", "--model", base, "--text", "x"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(base: Path, folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("embed", "--model", base, "--data", folder, "--output", tmp_path / "v.npy")
    assert result.exit_code == 2 and "Permission denied" in result.output


def test_a_full_disk_leaves_no_file(base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipft.inference.vectors.pq.ParquetWriter.write_table", full)
    result = run("embed", "--model", base, "--data", folder, "--output", tmp_path / "v.parquet")
    assert result.exit_code == 2 and "No space left on device" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {".v.parquet.parts"}
    monkeypatch.undo()
    ok("embed", "--model", base, "--data", folder, "--output", tmp_path / "v.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"v.parquet"}
