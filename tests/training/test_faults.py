"""What goes wrong in a run: it stops or goes on with a clear message, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from scripts import Script, import_paths
from tiny_clip import captioned, class_folders, tiny_clip
from tiny_trainer import StopAfter, same, trainer_of
from transformers import TrainerCallback
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.data.collate import CLIPDataCollator
from clipft.training.checkpoints import last_checkpoint

STEPS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


# ---- numbers that are not finite ----


class Poison(CLIPDataCollator):
    """The picture of one row is NaN from its second epoch on."""

    def __init__(self, row: int, epoch: int = 1) -> None:
        super().__init__(tiny_clip()[1])
        self.row, self.epoch = row, epoch

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        for place, row in enumerate(rows):
            if row.get("draw", (0, -1))[1] == self.row and row["draw"][0] >= self.epoch:
                batch["pixel_values"][place] = torch.nan
        return batch


@pytest.mark.parametrize("options", [{}, {"grad_cache_chunk_size": 3}, {"max_grad_norm": 0.0}])
def test_nan_stops_the_run_before_the_step(tmp_path: Path, options: dict[str, Any]) -> None:
    shared = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "save_strategy": "epoch"} | options
    trainer = trainer_of(tmp_path, captioned(27), **shared)
    trainer.data_collator = Poison(5)
    with pytest.raises(FloatingPointError, match=r"is not finite: loss .*nan.*, norm of the gradient nan") as caught:
        trainer.train()
    step, text = trainer.state.global_step, str(caught.value)
    assert 2 <= step < 4
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] == step + 1
    rows = {row["row"]: row["captions"] for row in found["rows"]}
    assert rows[5] == captioned(27)[5]["caption"].split("\n")
    assert len(rows) == (16 if step == 2 else 11)
    kept = tmp_path / f"checkpoint-{step}"
    assert f"step {step + 1} " in text and str(kept) in text and "non_finite.json" in text
    assert last_checkpoint(tmp_path) == kept
    whole = trainer_of(tmp_path / "whole", captioned(27), callbacks=[StopAfter(step)], **shared)
    whole.train()
    assert same(trainer.model, whole.model)
    saved = load_file(kept / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in whole.model.state_dict().items())
    resumed = trainer_of(tmp_path, captioned(27), **shared)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_nan_in_a_run_without_captions(tmp_path: Path) -> None:
    data = clipft.load_pairs(class_folders(tmp_path / "data", 16))
    trainer = trainer_of(tmp_path / "run", data, head="text")
    trainer.data_collator = Poison(5)
    with pytest.raises(FloatingPointError, match=r"step \d .* Rows of the batch: \d+, \d+"):
        trainer.train()
    assert 5 in {row["row"] for row in json.loads((tmp_path / "run" / "non_finite.json").read_text())["rows"]}


RANKS = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = {tests!r}
from ranks import leave
from test_faults import Poison
from tiny_clip import captioned
from tiny_trainer import trainer_of
torch.set_num_threads(1)
trainer = trainer_of(Path(sys.argv[1]), captioned(16), per_device_train_batch_size=4, save_strategy="epoch")
trainer.data_collator = Poison(5)
try:
    trainer.train()
except FloatingPointError as error:
    (Path(sys.argv[1]) / f"rank{{trainer.args.process_index}}").write_text(str(error))
leave()
"""


def test_nan_on_one_rank_stops_all_with_the_rows_of_all(tmp_path: Path) -> None:
    run_ranks(RANKS.format(tests=import_paths(__file__)), tmp_path)
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] in (3, 4)
    by_rank = [{row["row"] for row in found["rows"] if row["rank"] == rank} for rank in (0, 1)]
    assert [len(rows) for rows in by_rank] == [4, 4]
    assert sum(5 in rows for rows in by_rank) == 1
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


# ---- a full disk ----


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing fails beyond ``size`` bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullFrom(TrainerCallback):
    """No room from a step on."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.room = step, largest_file(size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.room.__enter__()


@pytest.mark.parametrize("size", [1000, 100_000, 600_000], ids=["config", "model", "optimizer"])
def test_a_full_disk_keeps_earlier_checkpoints_and_says_so(tmp_path: Path, size: int) -> None:
    full = FullFrom(3, size)
    trainer = trainer_of(tmp_path, captioned(32), callbacks=[full], **STEPS)
    try:
        with pytest.raises(OSError, match=r"checkpoint-3: the checkpoint cannot be written \(.+\)") as caught:
            trainer.train()
    finally:
        full.room.__exit__(None, None, None)
    assert f"the last whole checkpoint is {tmp_path / 'checkpoint-2'}. Make room and resume" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    resumed = trainer_of(tmp_path, captioned(32), **STEPS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


# ---- damaged checkpoints, and files that would run code ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer_of(folder, captioned(16), callbacks=[StopAfter(2)], **STEPS).train()
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle, where the numbers are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("model.safetensors", ["cut"]),  # no checksum, and no pickle
        ("optimizer.pt", ["cut", "flip", "pickle", "torch pickle"]),
        ("scheduler.pt", ["cut", "pickle", "torch pickle"]),
        ("rng_state.pth", ["cut", "flip", "pickle", "torch pickle"]),
        ("trainer_state.json", ["cut"]),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    checkpoints: Path, tmp_path: Path, name: str, damages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "ran"
    for damage in damages:
        folder = tmp_path / damage
        shutil.copytree(checkpoints, folder)
        path = folder / "checkpoint-2" / name
        if damage == "pickle":
            path.write_bytes(pickle.dumps(Evil(mark)))
        elif damage == "torch pickle":
            torch.save({"state": Evil(mark)}, path)
        else:
            (cut if damage == "cut" else flip)(path)
        assert last_checkpoint(folder) == folder / "checkpoint-1"
        assert f"{folder / 'checkpoint-2'} is not a whole checkpoint ({name} cannot be read" in caplog.text
        with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .*checkpoint-2 is not .*{name} cannot be read"):
            trainer_of(folder, captioned(16)).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert not mark.exists()


def test_the_earlier_checkpoint_is_gone_on_from(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(checkpoints, folder)
    cut(folder / "checkpoint-2" / "optimizer.pt")
    resumed = trainer_of(folder, captioned(16), **STEPS)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole", captioned(16))
    whole.train()
    assert same(resumed.model, whole.model)
    assert last_checkpoint(folder).name == "checkpoint-4"


def test_training_args_bin_is_never_read(checkpoints: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(checkpoints, folder)
    (folder / "checkpoint-2" / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    trainer_of(folder, captioned(16)).train(resume_from_checkpoint=True)
    clipft.load(folder / "checkpoint-2")
    assert not mark.exists()


def test_optimizer_and_random_state_are_read_with_weights_only(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], torch.load

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("weights_only") is True
        read.append(Path(path).name)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    trainer_of(checkpoints, captioned(16)).train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    assert set(read) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert read.count("optimizer.pt") == 2  # looked at first, then loaded


# ---- a process that is killed ----


class KillWorker(TrainerCallback):
    """The loader's first process, after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            workers = multiprocessing.active_children()
            assert workers
            for worker in workers:
                worker.kill()
            for worker in workers:  # dead, before the run may end: torch's signal handler raises wherever it finds us
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def test_a_loader_process_that_dies_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(64), callbacks=[KillWorker()], dataloader_num_workers=1, **STEPS)
    with pytest.raises(
        ChildProcessError, match=r"loads pictures has died \(DataLoader worker .*fewer workers"
    ) as caught:
        trainer.train()
    assert f"the last whole checkpoint is {last_checkpoint(tmp_path)}" in str(caught.value)


class IsAsked(TrainerCallback):
    """The loader's process dies while somebody else's code runs, as a logger's, which torch's error is none of."""

    raised: RuntimeError | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            (worker,) = multiprocessing.active_children()
            try:
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # torch looks for it too
                time.sleep(0.01)
            except RuntimeError as error:
                self.raised = error


def test_it_is_said_wherever_the_signal_finds_the_program(tmp_path: Path) -> None:
    asked = IsAsked()
    trainer = trainer_of(tmp_path, captioned(64), callbacks=[asked], dataloader_num_workers=1, **STEPS)
    with pytest.raises(ChildProcessError, match=r"loads pictures has died \(DataLoader worker"):
        trainer.train()
    assert asked.raised is None and trainer.state.global_step == 2
    assert getattr(signal.getsignal(signal.SIGCHLD), "__module__", "") == "torch.utils.data._utils.signal_handling"


DRIVER = """
import os, random, signal, sys, threading, time
from clipft.cli import main
from clipft.training import CLIPTrainer

when, argv = sys.argv[1], sys.argv[2:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if when == "writing":
    save = CLIPTrainer._save_rng_state

    def save_half(self, folder):
        if self.state.global_step == 4:
            open(os.path.join(folder, "rng_state.pth"), "wb").write(b"PK half a file")
            die()
        save(self, folder)

    CLIPTrainer._save_rng_state = save_half
else:
    step, last, rng = CLIPTrainer.training_step, time.monotonic(), random.Random()
    fatal = rng.randrange(3, 9)

    def random_moment(self, *args, **kwargs):
        global last
        took, last = time.monotonic() - last, time.monotonic()
        if self.state.global_step == fatal:
            threading.Timer(rng.random() * took, die).start()
        if self.state.global_step == fatal + 2:  # the step before that one was slower than these
            die()
        return step(self, *args, **kwargs)

    CLIPTrainer.training_step = random_moment
sys.argv = ["clipft", *argv]
main()
"""


def finish(command: list[str], output: Path, *more: str) -> str:
    """One thread, as the process that is killed has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, [*command, "--output", str(output), *more])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a run, and its output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for part in tiny_clip():
        part.save_pretrained(folder / "model")
    options = ["--batch-size", "8", "--epochs", "6", "--augmentation", "light", "--control-data", "none"]
    data = class_folders(folder / "data", 20)
    command = ["train", "--model", str(folder / "model"), "--data", str(data), *options]
    finish(command, folder / "whole")
    return command, folder / "whole"


@pytest.mark.parametrize("when", ["writing", "random"])
def test_killed_and_resumed_it_ends_as_an_undisturbed_run(
    tmp_path: Path, undisturbed: tuple[list[str], Path], when: str
) -> None:
    """`clipft train`, kill -9 while it writes its second checkpoint, or at a random moment after its first."""
    (command, whole), broken = undisturbed, tmp_path / "broken"
    killed = Script(DRIVER, when, *command, "--output", broken, OMP_NUM_THREADS="1").finish()
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (broken / "model.safetensors").exists()
    assert "resuming from" in finish(command, broken, "--resume")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    scores = [json.loads((folder / "report.json").read_text())["after"] for folder in (whole, broken)]
    assert scores[0] == scores[1]
