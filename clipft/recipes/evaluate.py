"""``clipft.evaluate``: what a model knows of a data set."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from clipft.console import console_of_run, show, show_calibration, without_bars
from clipft.data.classes import share_of_classes
from clipft.environment import environment
from clipft.evaluation.scoring import Found, Scorer, calibrated
from clipft.evaluation.tasks import evaluate_knn, evaluate_linear_probe
from clipft.files import check_output, write_json, write_text
from clipft.inference.classify import usual_templates
from clipft.models.calibrated import model_calibrations
from clipft.models.heads import LABEL, heads_of
from clipft.models.run_folder import classes_of_run
from clipft.recipes.evaluate_anomaly import check_kind_of_evaluation, evaluate_anomaly
from clipft.recipes.options import EvaluateOptions, options_from
from clipft.recipes.run import Scores, loaded, model_name
from clipft.recipes.sources import Sources, name_of
from clipft.report.examples import examples
from clipft.report.html import html_page

__all__ = ["evaluate"]


@without_bars()
def evaluate(
    model: Any,
    data: Any,
    output: str | Path | None = None,
    *,
    console: Console | None = None,
    **options: Any,
) -> Scores:
    """Zero-shot classification where the data has classes, retrieval where it has captions, and the model's heads; with
    ``anomaly=True`` how well defects are found, and where: the same as ``clipft evaluate``, with the same options.

    Args:
        model: a folder, a hub name, ``"demo"``, ``(model, processor)`` or a :class:`clipft.recipes.run.Run`.
        data: a source that :func:`clipft.load_pairs` takes; with ``anomaly`` a folder in MVTec AD's layout, as
            :mod:`clipft.data.inspection` has it.
        output: file for the numbers, as JSON; a page of the same name, ``.html``, goes beside it.
        console: where progress and tables go; default: standard output.
        options: fields of :class:`clipft.recipes.options.EvaluateOptions`: ``probe_data``, ``template``, ...

    Returns:
        By part (``zero_shot``, ``retrieval``, ``head``, ``attribute_NAME``, ``linear_probe``, ``knn``) the metrics of
        :func:`clipft.evaluate_zero_shot` and its like, each with its interval under ``intervals``; and under
        ``calibration``, by part again, what its probabilities are worth (``clipft.evaluation.calibration``): under the
        temperature that the model was saved with, or else under one that is fitted here, and not saved. With
        ``anomaly`` one part of that name, the metrics of :class:`clipft.evaluation.anomaly.AnomalyDetection`, and
        ``per_kind`` of defect. A dictionary, which a notebook shows as the page.

    Raises:
        TypeError: no such option. ValueError: an option or data that does not fit; the message names it.
        OSError: ``output`` cannot be written.
    """
    settings = options_from(EvaluateOptions, options)
    console = console or console_of_run()
    _check(settings, data, output)
    if settings.anomaly:
        return evaluate_anomaly(model, data, output, settings, console)
    sources = Sources(settings, console, settings.attribute or ())
    dataset = sources.rows("data", data, purpose="test")
    clip, processor = loaded(model)
    _check_attributes(clip, settings.attribute or (), console)
    near = settings.probe_data
    neighbours = None if near is None else sources.rows("probe_data", near, attributes=False)
    classes = sources.classes(dataset, [neighbours] if neighbours is not None else [])
    classes = _classes_of_run(model, classes) if settings.classes is None else classes
    templates = list(settings.template or usual_templates(clip, model_name(model)))
    scorer = Scorer(clip, processor, dataset, templates, settings.batch_size, settings.workers, console, classes)
    result = (found := scorer("evaluating")).to_json()
    told = _probabilities(found, clip, settings.precision_at)
    if neighbours is not None:
        result |= _probes(clip, processor, neighbours, dataset, settings)
    title = f"{model_name(model)} on {len(dataset)} pictures of {name_of(data)}{share_of_classes(dataset, classes)}"
    page = functools.partial(_page, title, result, sources, found, dataset, told)
    if output is not None:
        written = page(clip, processor)
        _write(Path(output), result | told | {"reading": sources.to_json()}, written)
    show({"score": result}, title, console)
    show_calibration(told.get("calibration", {}), console)
    _say_where(output, console)
    return Scores(result | told, page if output is None else lambda: written)


def _check(settings: EvaluateOptions, data: Any, output: str | Path | None) -> None:
    """What can be told before the work."""
    check_kind_of_evaluation(settings)
    probe = settings.probe_data
    if (probe is not None and probe is data) or (isinstance(probe, (str, Path)) and str(probe) == str(data)):
        raise ValueError("probe_data: expected other pictures than data, which would be scored on themselves")
    if output is not None and Path(output).suffix == ".html":
        raise ValueError(f"output: expected the name of the JSON file, the page goes beside it, got {output}")
    if output is not None:
        check_output(Path(output))
        check_output(Path(output).with_suffix(".html"))


def _classes_of_run(model: Any, own: list[str] | None) -> list[str] | None:
    """With the classes that a run's folder says it was scored against, where they are these and more."""
    known = classes_of_run(model_name(model))
    return own if own is None or known is None or not set(own) <= set(known) else known


def _probabilities(found: Found, model: Any, precision: float | None) -> dict[str, Any]:
    """``calibration``, by part, where there are classes."""
    probabilities = calibrated(found, model_calibrations(model), precision)
    if precision is not None and not probabilities:
        raise ValueError("precision_at: expected data with classes, whose answers are right or wrong; found none")
    return {"calibration": {part: own.to_json() for part, own in probabilities.items()}} if probabilities else {}


def _probes(model: Any, processor: Any, train: Any, test: Any, settings: EvaluateOptions) -> dict[str, Any]:
    how: dict[str, Any] = {"batch_size": settings.batch_size, "num_workers": settings.workers}
    return {
        "linear_probe": evaluate_linear_probe(model, processor, train, test, **how),
        "knn": evaluate_knn(model, processor, train, test, k=settings.knn_k, **how),
    }


def _write(path: Path, scores: dict[str, Any], page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, scores)
    write_text(path.with_suffix(".html"), page)


def _say_where(output: str | Path | None, console: Console) -> None:
    if output is not None:
        console.print(f"{output}, and {Path(output).with_suffix('.html')} to look at")


def _page(
    title: str,
    result: dict[str, Any],
    sources: Sources,
    found: Any,
    dataset: Any,
    told: dict[str, Any],
    *model: Any,
) -> str:
    report = {"score": result, **told, "environment": environment(), "reading": sources.to_json()}
    return html_page(report, title=title, examples=examples(found, dataset, *model))


def _check_attributes(model: Any, given: Iterable[str], console: Any) -> None:
    """That a model that is scored has heads for these columns; says which others it has."""
    heads, given = [name for name in heads_of(model) if name != LABEL], list(given)
    if wrong := [name for name in given if name not in heads]:
        raise ValueError(f"attribute: expected heads of the model, of which it has {heads}, got {wrong}")
    if rest := [name for name in heads if name not in given]:
        options = " ".join(f"--attribute {name}" for name in rest)
        console.print(f"the model has more heads, for data with their columns: {options}")
