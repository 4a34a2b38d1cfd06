"""Runs, merged and int8 models, encoders and vectors into one folder, at random, some killed on the way: what loads is
what the last step that ended wrote, or is refused.

A few seeds in the suite; ``CLIPFT_SEQUENCES=600`` goes on with new ones for as many seconds.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from killed import killed_before
from rich.console import Console
from tiny_clip import captioned, class_folders, tiny_clip

import clipft
from clipft.files import check_set, settle
from clipft.inference.vectors import VectorFile
from clipft.models.formats import ONNX_INFO
from clipft.models.saving import save_model

pytest.importorskip("peft")

SEEDS, STEPS, MODELS = (4, 5, 10), 6, 3
QUICK = {"control_data": "none", "lr": 0.01, "epochs": 2, "batch_size": 8}
QUIET = Console(quiet=True)
REFUSALS = (ValueError, OSError)
REFUSED = "refused"
State = dict[str, Any]  # by kind: what tells it apart, None where there is none of it
Act = Callable[[Path], State]  # writes into a folder; what it has put there


def digest(model: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def command(*arguments: Any) -> None:
    result = run(*arguments)
    if result.exit_code:
        assert result.exit_code == 2 and result.output.count("error: ") == 1, result.output
        raise ValueError(result.output.strip().splitlines()[-1])


class Steps:
    """What can be done with the models, adapters and texts in a folder. Each gives an act, with all that is left to
    chance chosen.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.seed = MODELS  # of the last training run or model
        self.killed_run: Act | None = None
        for number in range(MODELS):
            save_model(*tiny_clip(number), self.model(number))
            model, processor = clipft.load(self.model(number))
            adapted = clipft.add_lora(model, r=2)
            torch.manual_seed(number)
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(weight, std=0.1)
            save_model(adapted, processor, root / f"adapter-{number}")
        class_folders(root / "data", 20)
        (root / "texts.txt").write_text("a red square\na blue bar\n")

    def model(self, number: int) -> Path:
        return self.root / f"model-{number}"

    def one(self) -> int:
        return self.random.randrange(MODELS)

    def train(self) -> Act:
        number, self.seed = self.one(), self.seed + 1
        options: dict[str, Any] = QUICK | {"seed": self.seed} | ({"lora_r": 2} if self.random.random() < 0.5 else {})

        def act(out: Path, **more: Any) -> State:
            done = clipft.train(str(self.model(number)), str(self.root / "data"), out, console=QUIET, **options, **more)
            base = (number, digest(clipft.load(self.model(number))[0])) if "lora_r" in options else None
            return {"model": digest(done.model), "base": base, "onnx": None}

        return act

    def resume(self) -> Act:
        """The run that was killed."""
        run_on = self.killed_run
        return functools.partial(run_on, resume=True) if run_on else self.train()

    def merge(self) -> Act:
        adapter = self.root / f"adapter-{self.one()}"

        def act(out: Path) -> State:
            merged = digest(clipft.load(adapter)[0])
            command("merge", "--model", adapter, "--output", out)
            return {"model": merged, "base": None, "onnx": None}

        return act

    def quantize(self) -> Act:
        model = self.model(self.one())

        def act(out: Path) -> State:
            command("quantize", "--model", model, "--output", out)
            return {"model": digest(clipft.quantize(clipft.load(model)[0])), "base": None, "onnx": None}

        return act

    def export(self) -> Act:
        model, int8 = self.model(self.one()), self.random.random() < 0.5

        def act(out: Path) -> State:
            clip, processor = clipft.load(model)
            clipft.export_onnx(clip, processor, out, data=captioned(2), int8=int8)
            return {"onnx": (digest(clip), int8)}

        return act

    def embed(self) -> Act:
        model, ending = self.model(self.one()), self.random.choice(["npy", "parquet"])
        restart = ["--restart"] if self.random.random() < 0.7 else []

        def act(out: Path) -> State:
            texts = self.root / "texts.txt"
            command("embed", "--model", model, "--texts", texts, "--output", out / f"v.{ending}", *restart)
            return {ending: clipft.embed(*clipft.load(model), texts=texts.read_text().splitlines()).tolist()}

        return act

    def other_base(self) -> Act:
        """What an adapter may have been trained on becomes another model."""
        number, self.seed = self.one(), self.seed + 1
        clip = tiny_clip(self.seed)

        def act(out: Path) -> State:
            save_model(*clip, self.model(number))
            return {}

        return act


# ---- what loads ----


def found_in(folder: Path) -> State:
    """By kind; REFUSED where it does not load."""
    settle(folder)
    readers: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
        "model": (("config.json", "adapter_config.json"), lambda: digest(clipft.load(folder)[0])),
        "onnx": ((ONNX_INFO,), lambda: encoders(folder)),
        "npy": (("v.npy", ".clipft-committed.v.npy"), lambda: rows(folder / "v.npy")),
        "parquet": (("v.parquet",), lambda: rows(folder / "v.parquet")),
    }
    found: State = {}
    for kind, (names, read) in readers.items():
        try:
            found[kind] = read() if any((folder / name).exists() for name in names) else None
        except REFUSALS:
            found[kind] = REFUSED
    return found


def rows(path: Path) -> Any:
    return VectorFile.read(path).vectors.tolist()


def encoders(folder: Path) -> tuple[str, bool]:
    check_set(folder, ONNX_INFO)
    (word,) = {path.read_text() for path in folder.glob("*_encoder*.onnx")}
    return word, (folder / "image_encoder.int8.onnx").exists()


def due(state: State, steps: Steps) -> State:
    """What is to load: an adapter whose base has other weights by now is refused."""
    rest = {kind: value for kind, value in state.items() if kind != "base"}
    number, weights = state["base"] or (0, None)
    gone = weights is not None and digest(clipft.load(steps.model(number))[0]) != weights
    return rest | ({"model": REFUSED} if gone else {})


@pytest.fixture
def encoders_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder is a word that tells its model; all else of an export is as ever."""

    def encoders(model: Any, folder: Path, kind: str, *rest: Any) -> None:
        word = (folder / "image_encoder.onnx").read_text() if kind else digest(model)
        for side in ("image", "text"):
            (folder / f"{side}_encoder{kind}.onnx").write_text(word)

    monkeypatch.setattr("clipft.deploy.export._require_onnx", lambda: None)
    monkeypatch.setattr("clipft.deploy.export._write_encoders", encoders)
    monkeypatch.setattr("clipft.deploy.export._compare", lambda *rest: {})


# ---- sequences ----


def go(root: Path, seed: int) -> list[str]:
    """A sequence; returns what was done."""
    steps = Steps(root, seed)
    chance, out = steps.random, root / "out"
    kinds = [steps.train, steps.resume, steps.merge, steps.quantize, steps.export, steps.embed, steps.other_base]
    state: State = dict.fromkeys(("model", "base", "onnx", "npy", "parquet"))
    log = [f"seed {seed}"]
    for _ in range(STEPS):
        step = chance.choice(kinds)
        act, number = step(), chance.choice([0, chance.randrange(1, 12), chance.randrange(1, 80)])
        written: State = {}
        try:
            killed = killed_before(number or 10**6, root, lambda: written.update(act(out)))  # noqa: B023
            log.append(f"{step.__name__}{f', killed before change {number}' if killed else ''}")
        except REFUSALS as error:
            killed = False
            log.append(f"{step.__name__}, refused: {error}")
            assert "\n" not in str(error), log
        steps.killed_run = act if killed and step in (steps.train, steps.resume) else None
        found = found_in(out)
        if killed and found != due(state, steps):  # it had come to an end, but for what the next one who reads does
            shutil.rmtree(root / "again", ignore_errors=True)
            written = act(root / "again")
        state |= written
        assert found == due(state, steps), log
    return log


@pytest.mark.usefixtures("encoders_in_words")
def test_what_loads_is_what_the_last_step_wrote(tmp_path: Path) -> None:
    until = time.monotonic() + float(os.environ.get("CLIPFT_SEQUENCES", "0"))
    for seed in itertools.chain(SEEDS, itertools.count(SEEDS[-1] + 1)):
        if seed not in SEEDS and time.monotonic() > until:
            break
        log = go(tmp_path / f"{seed}", seed)
        if time.monotonic() < until:
            print(*log, sep="\n  ", flush=True)
        shutil.rmtree(tmp_path / f"{seed}")
