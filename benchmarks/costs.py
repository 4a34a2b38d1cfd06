"""What training costs by model and by what trains: seconds a pair, and the peak memory of the process.

    pip install peft
    OMP_NUM_THREADS=1 python benchmarks/costs.py [--only MODEL/METHOD ...] [--batch 8] [--steps 3] [--rounds 2]

``CLIPTrainer`` as benchmarks/training.py runs it: random weights, JPEG files of 256 px, captions of 6 to 16 tokens,
float32, AdamW, no loader workers. Each run is a process of its own, whose peak of resident memory counts, libraries and
all; the first of its steps is not timed, and rounds go through all of them in turn. Of the projections the time is that
of what the frozen towers say, which is computed once and kept. Written after each run; a run of the same settings on
the same machine and versions goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import kept, machine, memory, save, summary
from models import MODELS
from training import Clock, make_clip, make_data, make_processor, options

import clipft

NAMES = tuple(f"openai/clip-vit-{name}" for name in ("base-patch32", "base-patch16", "large-patch14"))
METHODS = ("towers", "lora", "int8", "full")  # int8: LoRA on such a base
ROWS = tuple((name, method) for name in NAMES for method in METHODS)


class Steps(Clock):
    """When each step ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def build(name: str, method: str, processor: Any) -> Any:
    torch.manual_seed(0)
    model = make_clip(MODELS[name][1], processor)
    if method in ("lora", "int8"):
        base = "int8" if method == "int8" else "float"
        return clipft.add_lora(model, r=16, alpha=32, dropout=0.1, frozen=base)
    return clipft.freeze(model, {"full": "none", "towers": "towers"}[method])


def run(name: str, method: str, batch: int, steps: int) -> dict[str, Any]:
    """One process's: seconds a pair of each timed step, and bytes."""
    processor = make_processor()
    model = build(name, method, processor)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), batch * steps)
        arguments = clipft.CLIPTrainingArguments(
            **options(Path(folder), batch, steps), feature_cache=str(Path(folder) / "features")
        )
        trainer = clipft.CLIPTrainer(model, arguments, train_dataset=data, processing_class=processor)
        clock = Steps()
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
    if method == "towers":
        seconds = [(clock.ends[-1] - start) / len(data)]
    else:
        seconds = [(end - begin) / batch for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"seconds": seconds, "peak": memory("VmHWM")}


def measured(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """:func:`run` in a process of its own."""
    line = [sys.executable, __file__, "--one", "--only", f"{name}/{method}", "--batch", str(args.batch)]
    done = subprocess.run([*line, "--steps", str(args.steps)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["/".join(row) for row in ROWS], metavar="MODEL/METHOD")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [row for row in ROWS if "/".join(row) in args.only]
    if args.one:
        print(json.dumps(run(*chosen[0], args.batch, args.steps)))
        return
    about, settings = machine(), {"batch": args.batch, "steps": args.steps}
    rows = {(row["model"], row["method"]): row for row in kept("costs", about, settings)}
    for number in range(args.rounds):
        for name, method in chosen:
            row = rows.setdefault((name, method), {"model": name, "method": method, "runs": []})
            if len(row["runs"]) > number:
                continue
            row["runs"].append(measured(name, method, args))
            row["seconds"] = summary([one for each in row["runs"] for one in each["seconds"]])
            row["peak_mb"] = max(each["peak"] for each in row["runs"]) / 2**20
            own = [rows[key] for key in ROWS if key in rows]
            print(row, save("costs", {"machine": about, "settings": settings, "rows": own}), flush=True)


if __name__ == "__main__":
    main()
