"""The command that scores: ``clipft evaluate``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import (
    AllowOutside,
    BadRows,
    BatchSize,
    Data,
    Model,
    OnBadRow,
    Templates,
    Workers,
    app,
    prepare,
    user_errors,
)
from clipft.cli.heads import AttributeNames, check_attributes


@app.command()
@user_errors
def evaluate(
    *,
    model: Model,
    data: Data,
    on_bad_row: BadRows = OnBadRow.error,
    allow_outside: AllowOutside = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    template: Templates = None,
    probe_data: Annotated[
        str | None,
        typer.Option(help="Labelled pictures of the same classes that fit a linear probe and kNN."),
    ] = None,
    attribute: AttributeNames = None,
    knn_k: Annotated[int, typer.Option("--knn-k", min=1, help="Neighbours of kNN.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="File for the numbers, as JSON; a page of the same name, .html, goes beside it.")
    ] = None,
) -> None:
    """Zero-shot classification where the data has classes, retrieval where it has captions; the model's heads."""
    console = prepare()
    from clipft import load_pairs
    from clipft.console import show
    from clipft.data.rows import DEFAULT_TEMPLATES
    from clipft.evaluation.scoring import Scorer
    from clipft.evaluation.tasks import evaluate_knn, evaluate_linear_probe
    from clipft.models.loading import load

    if probe_data == data:
        raise ValueError("--probe-data: expected other pictures than --data, which would be scored on themselves")
    if output is not None and output.suffix == ".html":
        raise ValueError(f"--output: expected the name of the JSON file, the page goes beside it, got {output}")
    dataset = load_pairs(
        data, on_bad_row=on_bad_row.value, allow_outside=allow_outside, attribute_columns=attribute or ()
    )
    clip, processor = load(model)
    check_attributes(clip, attribute or (), console)
    score = Scorer(clip, processor, dataset, template or list(DEFAULT_TEMPLATES), batch_size, workers, console)
    found = score("evaluating")
    result = found.to_json()
    if probe_data is not None:
        probes: dict[str, Any] = {
            "linear_probe": evaluate_linear_probe,
            "knn": functools.partial(evaluate_knn, k=knn_k),
        }
        neighbours = load_pairs(probe_data)
        for name, probe in probes.items():
            result[name] = probe(clip, processor, neighbours, dataset, batch_size=batch_size, num_workers=workers)
    title = f"{model} on {len(dataset)} pictures of {data}"
    show({"score": result}, title, console)
    if output is not None:
        _write_evaluation(output, title, result, found, dataset)
        console.print(f"{output}, and {output.with_suffix('.html')} to look at")


def _write_evaluation(output: Path, title: str, result: dict[str, Any], found: Any, dataset: Any) -> None:
    from clipft.environment import environment
    from clipft.files import write_json
    from clipft.report.examples import examples
    from clipft.report.html import write_html

    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    scores = {"score": result, "environment": environment()}
    write_html(output.with_suffix(".html"), scores, title=title, examples=examples(found, dataset))
