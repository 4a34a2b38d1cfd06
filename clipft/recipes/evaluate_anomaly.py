"""``clipft.evaluate(..., anomaly=True)``: how well defects are found, and where, on a test set with masks."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from clipft.console import bar, show
from clipft.data.inspection import InspectionSet, normal_folder, read_inspection, read_mask
from clipft.data.rows import read_row
from clipft.data.splits import existing
from clipft.environment import environment
from clipft.evaluation.anomaly import AnomalyDetection, PixelScores
from clipft.files import write_json, write_text
from clipft.recipes.anomaly import check_options, detector_of, shaded
from clipft.recipes.options import DataOptions, DetectorOptions, EvaluateOptions
from clipft.recipes.options_anomaly import AnomalyOptions
from clipft.recipes.run import Scores, loaded, model_name
from clipft.recipes.sources import name_of, reading_of
from clipft.report.anomalies import Worst, section
from clipft.report.html import html_page

__all__ = ["check_kind_of_evaluation", "evaluate_anomaly"]

_ANOMALY, _COMMON = "anomaly", ("max_pixels", "on_bad_row")


def check_kind_of_evaluation(settings: EvaluateOptions) -> None:
    """That only options of the kind of evaluation that is asked for are given.

    Raises:
        ValueError: the message names the first of the others.
    """
    own = {field.name for field in dataclasses.fields(DetectorOptions)} - {
        f.name for f in dataclasses.fields(DataOptions)
    }
    for field in dataclasses.fields(EvaluateOptions):
        value, default = getattr(settings, field.name), field.default
        if value is default or field.name in (_ANOMALY, *_COMMON) or (default is not None and value == default):
            continue
        if settings.anomaly and field.name not in own:
            raise ValueError(f"{field.name}: expected nothing beside anomaly (--anomaly), which makes no use of it")
        if not settings.anomaly and field.name in own:
            raise ValueError(f"{field.name}: expected anomaly=True (--anomaly) beside it: else nothing makes use of it")


def evaluate_anomaly(
    model: Any, data: Any, output: str | Path | None, settings: EvaluateOptions, console: Console
) -> Scores:
    """See :func:`clipft.evaluate`.

    Raises:
        ValueError: data in another layout than MVTec AD's, a mask that does not fit, and as :func:`clipft.anomaly`.
    """
    root = existing(data) if isinstance(data, (str, Path)) else None
    if root is None:
        raise ValueError(f"data: expected a folder in MVTec AD's layout with anomaly (--anomaly), got {name_of(data)}")
    readings = {"data": reading_of(settings), "masks": reading_of(settings)}
    test = read_inspection(root, readings["data"], readings["masks"])
    if not test.has_masks:
        del readings["masks"]
    for reading in readings.values():
        console.print(Text(f"{reading.source}: {reading.line()}"))
    if not test.has_masks:
        console.print(Text(f"{root}: has no ground_truth with masks: numbers of pictures alone"))
    options = _detector_options(settings, root)
    check_options(options)
    clip, processor = loaded(model)
    detector = detector_of(clip, processor, options, console, model_name(model))
    found, worst = _scored(detector, test, console)
    part = {**found.metrics(), "per_kind": found.per_kind(), "intervals": found.intervals()}
    result, accounts = {_ANOMALY: part}, {option: own.to_json() for option, own in readings.items()}
    title = f"{model_name(model)} on {found.pictures} pictures of {name_of(data)}"
    page = functools.partial(_page, title, result, accounts, worst)
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result | {"reading": accounts})
        write_text(path.with_suffix(".html"), page())
    show({"score": result}, title, console)
    if output is not None:
        console.print(f"{output}, and {path.with_suffix('.html')} to look at")
    return Scores(result, page)


def _detector_options(settings: EvaluateOptions, root: Path) -> AnomalyOptions:
    """Of the evaluation's options those that say what is normal: without any of them, the layout's own pictures are."""
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(DetectorOptions)}
    if all(given[name] is None for name in ("normal", "memory", "normal_text", "anomaly_text")):
        given["normal"] = normal_folder(root)
    return AnomalyOptions(**given)


def _scored(detector: Any, test: InspectionSet, console: Console) -> tuple[AnomalyDetection, Worst]:
    pixels, worst = PixelScores() if test.has_masks else None, Worst(shaded)
    scores = np.empty(len(test.kinds))
    names = list(test.dataset["id"])
    with bar(console) as progress:
        for row, kind in enumerate(progress.track(test.kinds, description="evaluating")):
            picture, file = read_row(test.dataset, row)["image"], test.masks[row]
            mask = None if file is None or kind is None else read_mask(file)
            found = detector(picture)
            own = None if pixels is None else pixels.add(found.map, mask)
            worst.add(names[row], kind, picture, (found.score, own), found.map, mask)
            scores[row] = found.score
    return AnomalyDetection(scores, test.kinds, pixels), worst


def _page(title: str, result: dict[str, Any], accounts: dict[str, Any], worst: Worst) -> str:
    report = {"score": result, "environment": environment(), "reading": accounts}
    return html_page(report, title=title, anomaly=section(result[_ANOMALY], worst))
