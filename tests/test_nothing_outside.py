"""What the system saw while strangers' files were read: nothing outside their folders is opened or written, no address
asked for, no program run.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

import clipft
from clipft.inference.vectors import Description, VectorFile

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("peft")

WATCHED = """
import os, sys
from contextlib import suppress
from itertools import islice
from pathlib import Path
import clipft
from fuzzing import cases
from clipft.inference.vectors import VectorFile

def tried(folder):
    with suppress(ValueError, OSError):
        if folder.name.startswith("data"):
            source = next(iter(folder.glob("given.*")), folder)
            for row in clipft.load_pairs(source, on_bad_row="skip"):
                row["image"].load()
        elif (folder / "v.npy").exists():
            VectorFile.read(folder / "v.npy")
        elif (folder / "clipft_onnx.json").exists():
            clipft.OnnxCLIP(folder, threads=1).encode_texts(["a"])
        else:
            clipft.load(folder)

def mark(name):
    with suppress(FileNotFoundError):
        open(f"/{name}")

secret, count, folders = Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
for folder in folders[:count]:  # imports what is imported late
    tried(folder)
mark("begins")
for folder in folders[count:]:
    tried(folder)
for folder in folders[:count]:
    good = {path.name: [path.read_bytes()] for path in folder.iterdir() if path.is_file()}
    for _, (name, data) in islice(cases(good, 5), 10):
        mark("pause")
        (folder / name).write_bytes(data)
        mark("begins")
        tried(folder)
        mark("pause")
        (folder / name).write_bytes(good[name][0])
mark("canary")
(folders[0] / ".." / secret.name / "0.png").read_bytes()
(secret / "written").write_bytes(b"")
"""


@pytest.fixture
def good_folders(base: Path, exported: tuple[Path, Any], tmp_path: Path) -> list[Path]:
    """One of each kind of model, and a file of vectors."""
    folders = [tmp_path / name for name in ("model", "adapter", "int8", "onnx", "vectors")]
    shutil.copytree(base, folders[0])
    model, processor = clipft.load(base)
    clipft.add_lora(clipft.load(base)[0], r=2).save_pretrained(folders[1])
    clipft.quantize(model).save_pretrained(folders[2])
    processor.save_pretrained(folders[2])
    shutil.copytree(exported[0], folders[3], ignore=shutil.ignore_patterns("*.int8.onnx"))
    described = json.loads((folders[3] / "clipft_onnx.json").read_text())
    (folders[3] / "clipft_onnx.json").write_text(json.dumps({k: v for k, v in described.items() if k != "files"}))
    vectors = VectorFile(["a"], np.eye(1, 4, dtype=np.float32), Description("images", "demo", "0", "x"))
    vectors.write(folders[4] / "v.npy")
    return folders


def hostile_folders(good: list[Path], secret: Path) -> list[Path]:
    """Each leads to the secret folder, which has all that it asks for, or to code of its own."""
    made = []

    def another(name: str, like: Path | None = None) -> Path:
        folder = secret.with_name(name)
        made.append(Path(shutil.copytree(like, folder)) if like else folder)
        folder.mkdir(exist_ok=True)
        return folder

    def edit(path: Path, **change: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    shutil.copytree(good[0], secret)
    for number in range(3):
        Image.new("RGB", (8, 8)).save(secret / f"{number}.png")
    (secret / "given.csv").write_text("image,caption\n0.png,a\n1.png,b\n")
    folder = another("model-index", good[0])
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../secret/model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(another("model-other", good[0]) / "config.json", transformers_weights="../secret/model.safetensors")
    folder = another("model-code", good[0])
    (folder / "own.py").write_text(f"open({str(secret / 'ran')!r}, 'w')\nclass P: pass\n")
    config = json.loads((folder / "processor_config.json").read_text())
    auto = {"AutoImageProcessor": "own.P", "AutoProcessor": "own.P"}
    config["image_processor"] |= {"image_processor_type": "Other", "auto_map": auto}
    (folder / "processor_config.json").write_text(json.dumps(config | {"auto_map": auto}))
    graph = onnx.load(another("onnx-data", good[3]) / "text_encoder.onnx")
    onnx.external_data_helper.convert_model_to_external_data(graph, location="../secret/model.safetensors")
    (made[-1] / "text_encoder.onnx").write_bytes(graph.SerializeToString())
    table = "image,caption\n../secret/0.png,a\n" + f"{secret / '1.png'},b\nlink/2.png,c\n"
    (another("data-table") / "given.csv").write_text(table)
    (made[-1] / "link").symlink_to(secret)
    stored = [{"bytes": None, "path": f"../secret/{number}.png"} for number in range(3)]
    pq.write_table(pa.table({"image": stored, "caption": ["a", "b", "c"]}), another("data-parquet") / "given.parquet")
    folder = another("data-readme")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret/given.csv\n---\n")
    (folder / "data-readme.py").write_text((good[0].parent / "model-code" / "own.py").read_text())
    datasets.Dataset.from_dict({"image": ["0.png"], "caption": ["a"]}).save_to_disk(secret / "saved")
    shutil.copytree(secret / "saved", another("data-saved"), dirs_exist_ok=True)
    edit(made[-1] / "state.json", _data_files=[{"filename": "../secret/saved/data-00000-of-00001.arrow"}])
    with tarfile.open(another("data-shard") / "given.tar", "w") as tar:
        place = f"tarslice:/{secret / '0.png'}@0+80/0.png"
        for name, text in (("0.json", json.dumps({"png": place, "image": "../secret/0.png"})), ("0.txt", place)):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, str(secret / "0.png")
        tar.addfile(member)
    return made


CALLS = "open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,truncate,link,linkat"
CALLS += ",symlink,symlinkat,chmod,fchmodat,chown,mknod,mknodat,execve,connect"


def test_nothing_outside_is_read_or_written(good_folders: list[Path], base: Path, tmp_path: Path) -> None:
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs strace, and leave to use it")
    secret, home, log = tmp_path / "secret", tmp_path / "home", tmp_path / "strace.log"
    hostile = hostile_folders(good_folders, secret)
    home.mkdir()
    watch = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", f"trace={CALLS}", "-s", "4096", "-o", log]
    paths = [Path(__file__).parent, Path(clipft.__file__).parents[1]]
    environment = os.environ | {"HOME": str(home), "HF_HOME": str(home), "TMPDIR": str(home)}
    environment |= {"PYTHONPATH": ":".join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [*watch, sys.executable, "-c", WATCHED, secret, str(len(good_folders)), *good_folders, *hostile]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # the last is the adapter's base
    own = [
        *good_folders,
        *hostile,
        Path(json.loads((good_folders[1] / "adapter_config.json").read_text())["base_model_name_or_path"]),
    ]
    odd, seen = seen_outside(log.read_text(errors="replace"), tmp_path, own)
    assert seen > 100 and len(odd["begins"]) == 0, "\n".join(odd["begins"][:20])
    assert len(odd["canary"]) == 2, "a look outside, or a file written there, is not seen"


def seen_outside(log: str, above: Path, own: list[Path]) -> tuple[dict[str, list[str]], int]:
    """By mark, the calls that reach what is not their own: to read of what is above it, to write of anything, or on the
    network; and how many reached their own."""
    odd: dict[str, list[str]] = {"begins": [], "canary": []}
    mark, seen = "pause", 0
    for line in log.splitlines():
        found = re.match(r'\d+ +(\w+)\((?:AT_FDCWD, |\d+, )?"([^"]*)"(.*)', line)
        call, path, rest = found.groups() if found else ("", "", "")
        if path in ("/begins", "/pause", "/canary"):
            mark = path[1:]
        elif mark == "pause":
            continue
        elif "connect(" in line:
            odd[mark] += [line] if "AF_INET" in line else []
        elif found:
            place = Path(os.path.normpath(path))
            inside = any(place.is_relative_to(folder) for folder in own)
            seen += inside
            opens = call.startswith("open")
            writes = not opens or re.search("O_WRONLY|O_RDWR|O_CREAT", rest)
            reads = opens and " = -1 " not in rest
            outside = place.is_relative_to(above) or not place.is_absolute() or place == Path("/etc/passwd")
            if place.is_relative_to("/dev"):
                continue
            if writes or (reads and outside and not inside):
                odd[mark].append(line)
    return odd, seen
