"""A bar for a run, in place of Trainer's printed dictionaries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from clipft.console import bar

__all__ = ["ProgressReport"]

# ---- progress ----


class ProgressReport(TrainerCallback):
    """One bar for the run, with the last loss, in place of Trainer's printed dictionaries."""

    def __init__(self, console: Console, title: str = "training") -> None:
        self.progress = bar(console)
        self.title = title
        self.task: Any = None

    def track(self, loop: Iterable[Any]) -> Iterable[Any]:
        """A bar for the frozen towers' features, above that of the training."""
        self.progress.start()
        return self.progress.track(loop, description="frozen towers")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar; a resumed run starts where it was."""
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.progress.update(
                self.task, description=f"{self.title}  epoch {state.epoch:.1f}  loss {logs['loss']:.4f}"
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print what early stopping looks at."""
        shown = {"eval_loss", args.metric_for_best_model} & (metrics or {}).keys()
        values = "  ".join(f"{name.removeprefix('eval_')} {(metrics or {})[name]:.4f}" for name in sorted(shown))
        self.progress.console.print(f"epoch {state.epoch:.0f} on the rows held out for it: {values}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.progress.stop()
