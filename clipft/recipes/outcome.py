"""What a training run measures before, during and after: the test rows, what may be forgotten, and the weights between
start and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from clipft.console import show, show_calibration
from clipft.data.drawings import control_drawings
from clipft.environment import environment
from clipft.evaluation.scoring import calibrated, calibrations_to_save, gains
from clipft.files import check_places, write_json, write_text
from clipft.models.calibrated import set_calibrations
from clipft.models.formats import ADAPTER_CONFIG, MERGED, SENTENCE_MODULES, WEIGHT_FILES, model_set
from clipft.models.fusing import unfuse
from clipft.models.lora import merged_base
from clipft.models.saving import write_model
from clipft.recipes.hold_out import Seen
from clipft.recipes.length import Length
from clipft.recipes.sources import Sources
from clipft.report.examples import examples
from clipft.report.html import write_html
from clipft.report.model_card import write_model_card
from clipft.training.wise_ft import RULE, sweep

__all__ = ["Outcome", "check_places_of_run", "check_report_to", "control_set", "save_run"]

_KEPT = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def check_report_to(names: Sequence[str]) -> None:
    """That tensorboard is there before an hour of training."""
    if "tensorboard" not in names:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("--report-to tensorboard needs tensorboard: pip install 'clipft[tensorboard]'") from error


def check_places_of_run(folder: Path, *, merged: bool) -> None:
    """That nothing else has the names of what a run leaves, before an hour of training.

    Raises:
        IsADirectoryError, NotADirectoryError: something has.
    """
    own = ["config.json", *WEIGHT_FILES, ADAPTER_CONFIG, SENTENCE_MODULES]
    own += ["report.json", "report.html", "config.yaml", "README.md"]
    check_places(folder, [*own, "checkpoints/checkpoint", *([f"{MERGED}/config.json"] if merged else [])])


def control_set(control_data: Any, sources: Sources) -> tuple[Any, str] | None:
    """The rows and their name."""
    if isinstance(control_data, str) and control_data == "none":
        return None
    if isinstance(control_data, str) and control_data == "drawings":
        return control_drawings(), "drawings of emoji in the package"
    rows = sources.rows("control_data", control_data, purpose="test", attributes=False)
    return rows, sources.accounts["control_data"].source


@dataclass
class Outcome:
    """Scores by stage (``before``, ``fine_tuned`` with ``--wise-ft``, ``after``) on the test rows and the control set.

    ``test``, ``control``: a ``clipft.evaluation.scoring.Scorer`` each; ``sources``: what the rows were read from;
    ``length``: of the run, as planned.
    """

    test: Any
    test_name: str
    sources: Sources
    length: Length
    control: Any = None
    control_name: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
    swept: Any = None
    probabilities: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, Any] | None = None  # which layers were int8 while it trained
    precision: dict[str, Any] | None = None  # likewise, of those that trained

    def measure(self, stage: str) -> None:
        """Score the model as it is now."""
        self.found[stage] = self.test(stage)
        if self.control is not None:
            self.controls[stage] = self.control(f"{stage}, control set")

    def sweep(self, line: Any, held_out: Any) -> None:
        """Score the fine-tuned model, then set its weights to the best point of the line. ``held_out``: a Scorer."""
        self.measure("fine_tuned")
        control = None if self.control is None else lambda: self.control("WiSE-FT, control set").main
        self.swept = sweep(line, lambda: held_out("WiSE-FT").main, control)

    def calibrate(self, model: Any, precision: float | None) -> None:
        """Fit the temperatures of the model as it was measured last, and have it know them."""
        self.probabilities = calibrated(self.found["after"], {}, precision)
        set_calibrations(model, calibrations_to_save(self.probabilities))

    def to_json(self, log_history: list[dict[str, Any]], versions: dict[str, Any]) -> dict[str, Any]:
        """report.json."""
        report: dict[str, Any] = _stages(self.found)
        if self.controls:
            about = {"data": self.control_name, "pictures": len(self.control.dataset)}
            report["control"] = about | _stages(self.controls)
        if self.probabilities:
            report["calibration"] = {part: own.to_json() for part, own in self.probabilities.items()}
        if self.swept is not None:
            report["wise_ft"] = self.swept.to_json()
        if self.frozen is not None:
            report["frozen"] = self.frozen
        if self.precision is not None:
            report["precision"] = self.precision
        report["test"] = {"data": self.test_name, "pictures": len(self.test.dataset)}
        report["length"] = self.length.to_json()
        report["reading"] = self.sources.to_json()
        if skipped := self.sources.skipped():  # with --on-bad-row skip
            report["skipped"] = skipped
        kept = [{k: v for k, v in entry.items() if k in _KEPT or _is_metric(k)} for entry in log_history]
        report["history"] = [entry for entry in kept if entry.keys() - {"step", "epoch"}]
        report["environment"] = versions
        return report

    def write(
        self, output: Path, name: str, log_history: list[dict[str, Any]], settings: dict[str, Any], *, merged: bool
    ) -> None:
        """report.json, report.html, config.yaml and model cards of this name beside the weights in ``output``."""
        versions = environment()
        report = self.to_json(log_history, versions)
        write_json(output / "report.json", report)
        write_text(output / "config.yaml", _to_yaml(settings, versions))
        title = f"{settings['model']} fine-tuned on {settings['data']}"
        settings = settings | {"epochs": self.length.epochs}
        write_html(
            output / "report.html",
            report,
            title=title,
            examples=examples(self.found["after"], self.test.dataset, self.test.clip, self.test.processor),
            settings=settings,
        )
        write_model_card(output, name, report, settings, adapter=merged)
        if merged:
            write_model_card(output / MERGED, MERGED, report, settings, adapter=False)

    def show(self, console: Console) -> None:
        """The tables."""
        tuned: tuple[str, ...] = ("before", "after")
        if self.swept is not None:
            console.print(f"\nWiSE-FT: alpha {self.swept.alpha:g}, {RULE}", highlight=False)
            if self.swept.note:
                console.print(f"WiSE-FT: {self.swept.note}", highlight=False)
            tuned = ("before", "fine_tuned", "after")
        found = {stage: self.found[stage].to_json() for stage in tuned}
        show(found, self.test_name, console, gains=gains(self.found["before"], self.found["after"]))
        if self.controls:
            name = f"control set, what was forgotten: {len(self.control.dataset)} pictures of {self.control_name}"
            controls = {stage: self.controls[stage].to_json() for stage in tuned}
            lost = gains(self.controls["before"], self.controls["after"])
            show(controls, name, console, gains=lost, classes=False)
        show_calibration({part: own.to_json() for part, own in self.probabilities.items()}, console)


def save_run(
    output: Path,
    model: Any,
    processor: Any,
    outcome: Outcome,
    log_history: list[dict[str, Any]],
    settings: dict[str, Any],
    seen: Seen,
) -> None:
    """All that a run leaves for use, as one set: the model, or an adapter and beside it the model with it merged in,
    reports and model cards, and which pictures it has seen. ``model`` is not of use for training any more.
    """
    failed = None
    with model_set(output) as staging:
        write_model(unfuse(model), processor, staging)
        seen.save(staging)
        if merged := hasattr(model, "merge_and_unload"):
            write_model(merged_base(model), processor, staging / MERGED)
            seen.save(staging / MERGED)
        try:
            outcome.write(staging, output.resolve().name, log_history, settings, merged=merged)
        except Exception as error:  # hours of training are worth more than the page about them
            failed = error
    if failed is not None:
        raise failed


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def _stages(found: dict[str, Any]) -> dict[str, Any]:
    """Each stage's numbers, and ``gain``: after - before."""
    report = {stage: scores.to_json() for stage, scores in found.items()}
    return {**report, "gain": gains(found["before"], found["after"])}


def _to_yaml(options: dict[str, Any], versions: dict[str, Any]) -> str:
    """A file for ``--config``, under a comment with the versions."""
    packages = {name: version for name, version in versions["packages"].items() if version}
    head = {"clipft": versions["clipft"], "python": versions["python"], **packages}
    return (
        "# repeats the run: clipft train --config THIS_FILE\n"
        + f"# with {', '.join(f'{name} {version}' for name, version in head.items())}\n"
        + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    )
