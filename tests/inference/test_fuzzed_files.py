"""Exports and vector files with damage made at random: they give what their files hold, or end in one line."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import LIARS, fuzz, lie_json
from PIL import Image
from tiny_clip import captioned, tiny_clip

import clipft
from clipft.inference.vectors import Description, VectorFile

SECONDS = 6.0
WRITING = ("creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "truncate")


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    folder = tmp_path / "export"
    clipft.export_onnx(*tiny_clip(), folder, data=captioned(4))
    described = json.loads((folder / "clipft_onnx.json").read_text())
    del described["files"], described["parity"]  # as a stranger's, without digests
    (folder / "clipft_onnx.json").write_text(json.dumps(described))

    def load() -> tuple[np.ndarray, np.ndarray]:
        clip = clipft.OnnxCLIP(folder, threads=1)
        return clip.encode_images([Image.new("RGB", (40, 50))]), clip.encode_texts(["a b", "a longer caption"])

    def equal(found: tuple[np.ndarray, np.ndarray]) -> None:
        assert [part.shape[1] for part in found] == [json.loads((folder / "clipft_onnx.json").read_text())["dim"]] * 2

    fuzz(folder, load, equal, SECONDS)


def lie_npy(rng: random.Random, data: bytes) -> bytes:
    """Of the header's shape and type, and of what it says of its own length."""
    size = int.from_bytes(data[8:10], "little")
    shape = rng.choice(
        ("()", "(4,)", "(3, 4)", "(4, 3)", "(-1, 4)", "(0, 4)", f"({10**12}, 4)", "(9**9, 4)", "(True, 4)")
    )
    kind = rng.choice(("<f4", ">f4", "<f8", "<f2", "|O", "<i4", "<U9", "V4", "|V99999999999", "[('a', '<f4')]"))
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice((True, False))}, 'shape': {shape}, }}\n".encode()
    length = rng.choice((len(header), len(header), 0, size, 0xFFFF))
    return data[:8] + length.to_bytes(2, "little") + header + data[10 + size :]


def lie_parquet(rng: random.Random, data: bytes) -> bytes:
    """Columns of other types, or none; descriptions that are none."""
    values = np.eye(4, dtype=np.float32)
    table = pq.read_table(io.BytesIO(data))
    described = lie_json(rng, table.schema.metadata[b"clipft"])
    ids = (table["id"], pa.array([1, 2, 3, 4]), pa.array(["a", None, "b", "c"]), pa.array([b"\xff"] * 4))
    columns = {
        "id": rng.choice(ids),
        rng.choice(("embedding", "embedding", "vector")): rng.choice(
            (
                table["embedding"],
                pa.array(values.tolist()),
                pa.array([[1.0], [], None, [2.0]]),
                pa.FixedSizeListArray.from_arrays(pa.array([None] * 16, pa.float32()), 4),
                pa.FixedSizeListArray.from_arrays(pa.array(range(16)), 4),
                pa.array(["x"] * 4),
            )
        ),
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({b"clipft": described}), file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_vectors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".npy", lie_npy)
    monkeypatch.setitem(LIARS, ".parquet", lie_parquet)
    path = tmp_path / "vectors" / name
    path.parent.mkdir()
    vectors = np.eye(4, 5, dtype=np.float32)
    VectorFile(["a", "b", "c", "d"], vectors, Description("images", "demo", "0", "pictures")).write(path)

    def equal(file: VectorFile) -> None:
        assert file.vectors.dtype == np.float32 and np.isfinite(file.vectors).all() and file.vectors.ndim == 2
        assert len(file.ids) == len(file.vectors) and all(isinstance(own, str) for own in file.ids)

    fuzz(path.parent, lambda: VectorFile.read(path), equal, SECONDS / 3)


def test_a_parquet_file_that_swells(tmp_path: Path) -> None:
    """Some kilobytes that say 120 MB."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(30_000_000, np.float32)), 500)
    table = pa.table([pa.array(["x"] * 60_000), vectors], names=["id", "embedding"])
    pq.write_table(table, tmp_path / "v.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"v\.parquet: expected a file that clipft embed wrote \(more than 1\d\d MB"):
        VectorFile.read(tmp_path / "v.parquet")


def test_a_folder_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".npy", lie_npy)
    folder = tmp_path / "img_emb"
    folder.mkdir()
    for number in range(2):
        np.save(folder / f"img_emb_{number}.npy", np.eye(3, 4, dtype=np.float16))

    def equal(file: VectorFile) -> None:
        assert len(file.ids) == len(file.vectors) and np.isfinite(file.vectors).all()

    fuzz(folder, lambda: VectorFile.read(folder), equal, SECONDS / 6)


# ---- what the system saw ----

WATCHED = """
import os, sys
from itertools import islice
from pathlib import Path
import clipft
from fuzzing import cases
from clipft.inference.vectors import VectorFile
folders = [Path(name) for name in sys.argv[1:]]
def tried(folder):
    try:
        if (folder / "v.npy").exists():
            VectorFile.read(folder / "v.npy")
        elif (folder / "clipft_onnx.json").exists():
            clipft.OnnxCLIP(folder, threads=1).encode_texts(["a"])
        else:
            clipft.load(folder)
    except (ValueError, OSError):
        pass
def no_address(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        os._exit(3)
sys.addaudithook(no_address)
for folder in folders:  # imports what is imported late
    tried(folder)
os.path.exists("/begins")
for folder in folders:
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _, case in islice(cases(good, 5), 25):
        changed = folder.with_name(f"{folder.name}-changed")
        os.path.exists("/pause")
        changed.mkdir(exist_ok=True)
        for name, data in (good | case).items():
            (changed / name).write_bytes(data)
        os.path.exists("/begins")
        tried(changed)
os.path.exists("/pause")
"""


def test_nothing_outside_is_read_or_written(base: Path, tmp_path: Path) -> None:
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs strace, and leave to use it")
    folders = [tmp_path / name for name in ("model", "adapter", "int8", "onnx", "vectors")]
    shutil.copytree(base, folders[0])
    model, processor = clipft.load(base)
    clipft.add_lora(clipft.load(base)[0], r=2).save_pretrained(folders[1])
    clipft.quantize(model).save_pretrained(folders[2])
    processor.save_pretrained(folders[2])
    clipft.export_onnx(model, processor, folders[3], data=captioned(2))
    described = json.loads((folders[3] / "clipft_onnx.json").read_text())
    (folders[3] / "clipft_onnx.json").write_text(json.dumps({k: v for k, v in described.items() if k != "files"}))
    folders[4].mkdir()
    vectors = VectorFile(["a"], np.eye(1, 4, dtype=np.float32), Description("images", "demo", "0", "x"))
    vectors.write(folders[4] / "v.npy")
    home = tmp_path / "home"
    home.mkdir()
    log, paths = tmp_path / "strace.log", [Path(__file__).parents[1], Path(clipft.__file__).parents[1]]
    watch = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=%file", "-s", "4096", "-o", log]
    environment = os.environ | {"HOME": str(home), "HF_HOME": str(home), "TMPDIR": str(home)}
    environment |= {"PYTHONPATH": ":".join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [*watch, sys.executable, "-c", WATCHED, *folders]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    odd, watching, seen = [], False, 0
    own = tuple(map(str, [*folders, base, home / ".cache" / "Microsoft"]))  # the last is ONNX Runtime's, by its import
    for line in log.read_text(errors="replace").splitlines():
        if '"/begins"' in line or '"/pause"' in line:
            watching = '"/begins"' in line
        elif watching and (found := re.match(r'\d+ +(\w+)\((?:AT_FDCWD, |\d+, )?"([^"]*)"(.*)', line)):
            call, path, rest = found.groups()
            seen += path.startswith(own)
            writes = call in WRITING or (call.startswith("open") and re.search("O_WRONLY|O_RDWR|O_CREAT", rest))
            opened = call.startswith("open") and " = -1 " not in rest
            outside = path.startswith(("/etc/passwd", str(tmp_path), str(home))) or not path.startswith("/")
            if (writes and not path.startswith(("/dev/", own[-1]))) or (
                opened and outside and not path.startswith(own)
            ):
                odd.append(line)
    assert seen > 100 and not odd, "\n".join(odd[:20])
