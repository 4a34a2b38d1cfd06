"""What stops a run, said so that it can be mended: numbers that are not finite, a process of the loader that died."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data._utils import signal_handling

from clipft.files import write_json

__all__ = ["NON_FINITE", "all_finite", "non_finite_message", "worker_death", "worker_deaths"]

NON_FINITE = "non_finite.json"
_SHOWN = 8  # rows in a message
_DEATH = "DataLoader worker (pid"  # in torch's message


def all_finite(losses: list[Tensor], grad_norm: Any, *, scaled: bool, ranks: int) -> bool:
    """Whether a step may be taken, the same answer on every rank; the host waits for the device once.

    Args:
        losses: of the step's micro-batches.
        grad_norm: of all gradients; None where it is not known.
        scaled: float16's scaler is on, which meets infinite gradients itself.
        ranks: number of processes.
    """
    finite = torch.stack(losses).isfinite().all()
    if grad_norm is not None and not scaled:
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
        finite = finite & norm.isfinite().to(finite.device)
    if ranks > 1:
        everywhere = finite.float()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        finite = everywhere > 0
    return bool(finite)


def non_finite_message(trainer: Any, losses: list[Tensor], grad_norm: Any, kept: str) -> str:
    """Says step, numbers and rows of all ranks, and writes them to ``non_finite.json`` in the output folder.

    Args:
        trainer: a ``clipft.CLIPTrainer`` in the step.
        losses: of the step's micro-batches on this rank.
        grad_norm: of all gradients.
        kept: what is left of the run.
    """
    own = [[trainer.args.process_index, index, captions] for index, captions in _rows_of_step(trainer)]
    rows = own
    if trainer.args.world_size > 1:
        parts: list[Any] = [None] * trainer.args.world_size
        dist.all_gather_object(parts, own)
        rows = [row for part in parts for row in part]
    step, epoch = trainer.state.global_step + 1, trainer.state.epoch
    found = {
        "loss": [str(loss.item()) for loss in losses],
        "grad_norm": str(grad_norm if grad_norm is None else float(grad_norm)),
    }
    path = Path(trainer.args.output_dir) / NON_FINITE
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = [{"rank": rank, "row": index, "captions": captions} for rank, index, captions in rows]
        write_json(path, {"step": step, "epoch": epoch, **found, "rows": listed})
    shown = ", ".join(f"{index} ({captions[0]!r})" if captions else str(index) for _, index, captions in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return (
        f"step {step} (epoch {epoch:.2f}) is not finite: loss {', '.join(found['loss'])}, norm of the gradient "
        f"{found['grad_norm']}. It was not taken; {kept}. Rows of the batch: {shown}{more}; all of them in {path}. "
        "Look at these rows (clipft doctor), lower the learning rate, or train in float32"
    )


def _rows_of_step(trainer: Any) -> Iterator[tuple[int, list[str]]]:
    """Index and captions of this rank's rows, from the sampler, which gives an epoch's rows again when asked. A run of
    a head alone reads no captions.
    """
    loader, accumulated = trainer.callback_handler.train_dataloader, trainer.args.gradient_accumulation_steps
    first = trainer.state.global_step % -(-len(loader) // accumulated) * accumulated
    batches = islice(loader.batch_sampler, first, first + trainer.current_gradient_accumulation_steps)
    return ((key[1], loader.dataset[key[1]].get("captions", [])) for keys in batches for key in keys)


def worker_death(error: RuntimeError) -> str:
    """Of an error that torch raises over a loader's process that was killed: a sentence that helps; else nothing."""
    if _DEATH not in str(error):
        return ""
    return (
        f"a process that loads pictures has died ({str(error).strip()}), most often for want of memory: take fewer "
        "workers, or smaller pictures"
    )


@contextmanager
def worker_deaths(kept: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """A process of the loader that was killed, in words that help. Yields a check, to be called between steps: raises
    where one has died. ``kept``: says what is left of the run.
    """
    died: list[RuntimeError] = []

    def check() -> None:
        if died:
            raise died[0]

    try:
        with _noted(died):
            yield check
    except RuntimeError as error:
        if not (said := worker_death(error)):
            raise
        raise ChildProcessError(f"{said}; {kept()}") from error


@contextmanager
def _noted(died: list[RuntimeError]) -> Iterator[None]:
    """torch's signal handler raises wherever the program happens to be, also where errors are swallowed, as within
    ``logging``: keep what it raises.
    """
    if threading.current_thread() is threading.main_thread():  # which alone has handlers
        signal_handling._set_SIGCHLD_handler()  # if this is the first loader
    torchs = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(torchs):
        yield
        return

    def note(number: int, frame: Any) -> None:
        try:
            torchs(number, frame)
        except RuntimeError as error:
            if not worker_death(error):
                raise
            died.append(error)

    signal.signal(signal.SIGCHLD, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, torchs)
