"""Whose checkpoints a run's folder holds: a run goes on from its own alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clipft.files import read_json, write_json
from clipft.recipes.options import ScoringOptions, TrainOptions
from clipft.training.checkpoints import last_checkpoint

__all__ = ["claim", "identity_of_run", "resume_point"]

RUN = "run.json"
_FREE = {  # options that change nothing of what is learned; how data was read shows in its rows
    *(field.name for field in dataclasses.fields(ScoringOptions)),
    *("model", "data", "output", "eval_data", "control_data", "workers", "report_to"),
    *("auto_batch", "grad_cache_chunk_size", "gradient_checkpointing"),
}
_WORDS = {"model": "the model it starts from", "adapter": "peft_config", "processes": "the number of processes"}


def identity_of_run(
    options: Mapping[str, Any], model: str, rows: Mapping[str, Any], *, adapter: Any, processes: int
) -> dict[str, Any]:
    """What makes a run what it is, as JSON.

    Args:
        options: as it uses them.
        model: a digest of what it starts from.
        rows: by part (``train``, ``validation``) number and digest of its rows.
        adapter: what ``peft_config`` says.
        processes: how many.
    """
    settings = {name: None if value == [] else value for name, value in options.items() if name not in _FREE}
    found = {"model": model, "rows": rows, "adapter": adapter, "processes": processes, "settings": settings}
    own: dict[str, Any] = json.loads(json.dumps(found, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
    return own


def resume_point(checkpoints: Path, own: dict[str, Any], console: Console, *, force: bool) -> str | None:
    """The last whole checkpoint of a run, None where it has none yet.

    Raises:
        ValueError: the checkpoints are another run's, and ``force`` does not insist.
    """
    if not any(checkpoints.glob("checkpoint-*")):
        console.print(Text(f"--resume: no checkpoint in {checkpoints.parent} yet, starting from the beginning"))
        return None
    if (odd := _differences(checkpoints, own)) and not force:
        raise ValueError(
            f"resume: expected checkpoints of this run in {checkpoints}, found another's: {'; '.join(odd)}. Give what "
            "it had, leave --resume out, which moves them aside, or insist with --force"
        )
    checkpoint = last_checkpoint(checkpoints)
    console.print(Text(f"resuming from {checkpoint}{', though ' + '; '.join(odd) if odd else ''}"))
    return str(checkpoint)


def claim(checkpoints: Path, own: dict[str, Any], console: Console, *, resumed: bool) -> None:
    """Say whose checkpoints will be here; another run's are moved aside."""
    if not resumed and any(checkpoints.glob("checkpoint-*")) and _differences(checkpoints, own):
        aside = next(
            path for number in range(1, 10_000) if not (path := checkpoints.with_name(f"checkpoints.{number}")).exists()
        )
        checkpoints.rename(aside)
        console.print(Text(f"checkpoints of another run in this folder are now in {aside}"))
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / RUN, own)


def _differences(checkpoints: Path, own: dict[str, Any]) -> list[str]:
    """In what the run whose checkpoints these are was another one, in words."""
    try:
        other = read_json(checkpoints / RUN)
    except FileNotFoundError:
        return [f"there is no {RUN}, which says whose they are"]
    odd = [_WORDS[name] for name in ("model", "adapter") if other.get(name) != own.get(name)]
    for part, rows in own["rows"].items():
        then = _object(_object(other.get("rows")).get(part))
        if then != _object(rows):
            before, now = (parts.get("count", 0) for parts in (then, _object(rows)))
            how = "other pictures, captions or labels" if before == now else f"{before} then, {now} now"
            odd.append(f"the rows of {part} ({how})")
    if other.get("processes") != own["processes"]:
        odd.append(f"{_WORDS['processes']} ({other.get('processes')} then, {own['processes']} now)")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    then = _object(other.get("settings"))
    for name, value in own["settings"].items():
        if (before := then.get(name, defaults.get(name))) != value:
            odd.append(f"{name} ({before} then, {value} now)")
    return odd


def _object(value: Any) -> dict[str, Any]:
    """What stands in a file that anybody may have edited; none where it is something else."""
    return value if isinstance(value, dict) else {}
