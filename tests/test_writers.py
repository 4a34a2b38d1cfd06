"""Whatever clipft writes, its writer killed before each change that it makes to files: the old is there, or the new."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from killed import killed_before, visible
from safetensors.torch import save_file
from tiny_clip import tiny_clip
from transformers import TrainerState

import clipft
from clipft.files import replace_set, settle, write_text
from clipft.inference.shards import SHARD
from clipft.inference.vectors import Description, VectorFile, embed_to_file
from clipft.models.formats import ONNX_INFO, ONNX_MODELS, model_set
from clipft.models.saving import save_model
from clipft.recipes.hold_out import Seen
from clipft.recipes.outcome import save_run
from clipft.training.checkpoints import StagedCheckpoints, last_checkpoint

Write = Callable[[Path], object]


def text(words: str) -> Write:
    return lambda folder: write_text(folder / "a.txt", words)


def vectors(number: int, ending: str) -> Write:
    what = VectorFile([f"{number}"], np.full((1, 2), number, np.float32), Description("texts", "m", f"{number}", "s"))
    return lambda folder: what.write(folder / f"v{ending}")


def read_vectors(folder: Path) -> None:
    (path,) = [path for path in folder.glob("v.*") if path.suffix != ".json"]
    found = VectorFile.read(path)
    assert found.ids == [found.description.identity] == [f"{int(found.vectors[0, 0])}"]


def embedded(number: int) -> Write:
    encoder: Any = SimpleNamespace(texts=lambda rows: np.full((len(rows), 2), number, np.float32))
    ids = [f"{row}" for row in range(2 * SHARD + 1)]

    def write(folder: Path) -> None:
        embed_to_file(encoder, ids, ids, folder / "v.npy", Description("texts", "m", f"{number}", "s"))

    return write


def model(seed: int) -> Write:
    clip, processor = tiny_clip(seed)
    return lambda folder: save_model(clip, processor, folder)


def int8(seed: int) -> Write:
    clip, processor = tiny_clip(seed)
    quantized = clipft.quantize(clip)
    return lambda folder: save_model(quantized, processor, folder)


def lora_run(seed: int, base: Path) -> Write:
    """As a run leaves it: the adapter, the merged model, reports; written once, copied from then on."""
    pytest.importorskip("peft")
    clip, processor = clipft.load(base)
    adapted = clipft.add_lora(clip, r=2)
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    outcome: Any = SimpleNamespace(write=lambda folder, *rest, **more: write_text(folder / "report.json", f"{seed}"))
    prepared = base.parent / f"{base.name}-run" / f"{seed}"
    save_run(prepared, adapted, processor, outcome, [], {}, Seen())

    def write(folder: Path) -> None:
        with model_set(folder) as staging:
            shutil.copytree(prepared, staging, dirs_exist_ok=True)

    return write


def onnx(name: str, int8: bool) -> Write:
    def encoders(folder: Path) -> None:
        with replace_set(folder, ONNX_INFO, obsolete=ONNX_MODELS) as staging:
            for part in ("image", "text", *(("image.int8", "text.int8") if int8 else ())):
                side, dot, kind = part.partition(".")
                (staging / f"{side}_encoder{dot}{kind}.onnx").write_text(f"{name} {part}")

    return encoders


def checkpoint(seed: int) -> Write:
    """Where another run left one of the same step."""

    class Writes(StagedCheckpoints):
        def __init__(self, folder: Path) -> None:
            self.args: Any = SimpleNamespace(
                should_save=True, save_total_limit=None, push_to_hub=False, output_dir=str(folder / "checkpoints")
            )
            self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
            self.state = TrainerState(global_step=2)
            self.hp_search_backend = None

        def _write_checkpoint(self, folder: Path, model: Any, trial: Any) -> None:
            folder.mkdir(parents=True)
            save_file({"a": torch.full((2,), seed)}, folder / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({}, folder / name)

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        Writes(folder)._save_checkpoint(torch.nn.Identity(), None)

    return write


def find_checkpoint(folder: Path) -> None:
    assert last_checkpoint(folder / "checkpoints").name == "checkpoint-2"


def settle_all(folder: Path) -> None:
    settle(folder)
    settle(folder, "v.npy")


def kinds(base: Path) -> dict[str, tuple[Callable[[], Write], Callable[[], Write], Write]]:
    """By name: two writers, and a reader."""
    return {
        "text": (lambda: text("old"), lambda: text("new"), lambda folder: (folder / "a.txt").read_text()),
        "vectors.npy": (lambda: vectors(1, ".npy"), lambda: vectors(2, ".npy"), read_vectors),
        "vectors.parquet": (lambda: vectors(1, ".parquet"), lambda: vectors(2, ".parquet"), read_vectors),
        "model": (lambda: model(0), lambda: model(1), clipft.load),
        "run": (lambda: lora_run(1, base), lambda: lora_run(2, base), clipft.load),
        "full after adapter": (lambda: lora_run(1, base), lambda: model(2), clipft.load),
        "adapter after full": (lambda: model(1), lambda: lora_run(2, base), clipft.load),
        "int8": (lambda: int8(0), lambda: int8(1), clipft.load),
        "full after int8": (lambda: int8(0), lambda: model(1), clipft.load),
        "onnx": (lambda: onnx("a", True), lambda: onnx("b", False), settle),
        "checkpoint": (lambda: checkpoint(1), lambda: checkpoint(2), find_checkpoint),
    }


@pytest.mark.parametrize("kind", kinds(Path()))
def test_a_writer_killed_anywhere_leaves_the_old_or_the_new(kind: str, base: Path, tmp_path: Path) -> None:
    first, second, read = kinds(base)[kind]
    old, new = first(), second()
    old(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    new(tmp_path / "new")
    before, after = visible(tmp_path / "old"), visible(tmp_path / "new")
    assert before != after
    left = []
    for number in range(1, 200):
        work = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "old", work)
        killed = killed_before(number, work, lambda: new(work))  # noqa: B023
        if list(work.rglob(".clipft-committed*")):  # it comes down to the reader, who is killed as well
            killed_before(number % 4 + 1, work, lambda: settle(work))  # noqa: B023
            (read if number % 3 == 0 else settle_all)(work)
        elif kind == "checkpoint":
            read(work)
        found = {name: data for name, data in visible(work).items() if not name.startswith("checkpoints/tmp-")}
        assert found in (before, after), (number, found.keys() ^ after.keys())
        left.append(found == after)
        new(work)
        assert visible(work) == after and all_names(work) == all_names(tmp_path / "new"), number
        if not killed:
            break
    assert left == sorted(left) and left[-1] and not left[0]


def all_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_embedding_killed_anywhere_goes_on(tmp_path: Path) -> None:
    embedded(1)(tmp_path / "whole")
    whole = visible(tmp_path / "whole")
    for number in range(1, 200):
        killed = killed_before(number, tmp_path / f"{number}", lambda: embedded(1)(tmp_path / f"{number}"))  # noqa: B023
        embedded(1)(tmp_path / f"{number}")
        assert visible(tmp_path / f"{number}") == whole and all_names(tmp_path / f"{number}") == set(whole)
        if not killed:
            break
    assert number > 10
