"""report.json as a page for people: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from clipft.console import by_class, number, title_of, worst_classes
from clipft.files import write_text
from clipft.report.charts import interval_bar, line_chart, reliability_chart

__all__ = ["body_of", "html_page", "write_html"]

_STAGES = {"before": "before", "fine_tuned": "fine-tuned (alpha 1)", "after": "after", "score": "score"}
_TITLES = {
    "zero_shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
    "head": "Classification head",
    "anomaly": "Anomaly detection",
}
_LARGEST_MATRIX = 25  # classes
_CLASSES = 200  # rows of the table of classes


_BODY = '<div class="clipft">', "</body>"


def write_html(path: Path, report: dict[str, Any], **parts: Any) -> None:
    """Write :func:`html_page` of the report."""
    write_text(path, html_page(report, **parts))


def body_of(page: str) -> str:
    """The part of :func:`html_page` that another page can hold, such as a notebook: its styles are its own."""
    return page[page.index(_BODY[0]) : page.rindex(_BODY[1])]


def html_page(
    report: dict[str, Any],
    *,
    title: str,
    examples: list[dict[str, Any]] = (),  # type: ignore[assignment]
    settings: dict[str, Any] | None = None,
    anomaly: dict[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        report: as in report.json; ``{"score": {...}}`` of ``clipft evaluate``.
        title: a heading.
        examples: of ``clipft.examples``.
        settings: options by name.
        anomaly: of :func:`clipft.report.anomalies.section`.
    """
    stages = [stage for stage in _STAGES if stage in report]
    control = report.get("control")
    page = {
        "title": title,
        "report": report,
        "results": [_table(report, kind, stages) for kind in report[stages[-1]]],
        "control": [_table(control, kind, stages) for kind in control["after"]] if control else [],
        "classes": _classes(report[stages[-1]], stages[-1]),
        "calibration": _calibration(report.get("calibration", {})),
        "curves": _curves(report.get("history", [])),
        "wise_ft": _wise_ft(report["wise_ft"]) if "wise_ft" in report else None,
        "examples": examples,
        "anomaly": anomaly,
        "settings": {name: value for name, value in (settings or {}).items() if value is not None},
    }
    loader = PackageLoader("clipft.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page)


def _table(report: dict[str, Any], kind: str, stages: list[str]) -> dict[str, Any]:
    """Metrics by stage with intervals, and the gain."""
    last = report[stages[-1]][kind]
    names = [name for name in last["intervals"] if name != "per_class"]
    if len(last.get("per_class", range(6))) <= 5 and "top5" in names:
        names.remove("top5")  # of five classes all are
    return {
        "title": _TITLES.get(kind, f"Attribute: {title_of(kind)}"),
        "stages": [_STAGES[stage] for stage in stages],
        "rows": [_row(report, kind, stages, name) for name in names],
    }


def _row(report: dict[str, Any], kind: str, stages: list[str], name: str) -> dict[str, Any]:
    values = [report[stage][kind][name] for stage in stages]
    intervals = [report[stage][kind]["intervals"][name] for stage in stages]
    row: dict[str, Any] = {
        "name": name.replace("_", " "),
        "cells": [_cell(name, value, edges) for value, edges in zip(values, intervals, strict=True)],
        "chart": "" if name.endswith("rank") else interval_bar(list(zip(values, intervals, strict=True))),
    }
    if "gain" in report:
        gain = report["gain"][kind][name]
        low, high = gain["interval"]
        better = -1 if name.endswith("rank") else 1
        digits = 1 if name.endswith("rank") else 3
        row["gain"] = f"{gain['value']:+.{digits}f}"
        row["gain_interval"] = f"{low:+.{digits}f} to {high:+.{digits}f}"
        row["sign"] = "" if low <= 0 <= high else "good" if better * gain["value"] > 0 else "bad"
    return row


def _cell(name: str, value: float, edges: list[float]) -> dict[str, str]:
    return {"value": number(name, value), "interval": " to ".join(number(name, edge) for edge in edges)}


def _classes(result: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """Rows by class and, up to a size, the confusion matrix with each row's shares, else the commonest confusions."""
    kind = by_class(result)
    if kind is None:
        return None
    found = result[kind]
    edges = {row["class"]: row for row in found["intervals"]["per_class"]}
    chosen, which = worst_classes(found["per_class"], _CLASSES)
    rows = [
        {
            "class": row["class"],
            "support": row["support"],
            "cells": [_cell(name, row[name], edges[row["class"]][name]) for name in ("precision", "recall", "f1")],
        }
        for row in chosen
    ]
    names = [row["class"] for row in found["per_class"]] if len(found["per_class"]) <= _LARGEST_MATRIX else []
    return {
        "stage": _STAGES[stage],
        "which": which,
        "rows": rows,
        "names": names,
        "matrix": _matrix(names, found["confusion_matrix"]) if names else [],
        "confusions": [] if names else found["confusions"],
    }


def _matrix(names: list[str], counts: list[list[int]]) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            "cells": [
                {"count": count, "share": count / max(sum(line), 1), "right": column == row, "as": names[column]}
                for column, count in enumerate(line)
            ],
        }
        for row, (name, line) in enumerate(zip(names, counts, strict=True))
    ]


def _calibration(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each classifier what its probabilities are worth, under the logits as they were and under its temperature."""
    rows = [
        {
            "title": _TITLES.get(name, f"Attribute: {title_of(name)}"),
            "temperature": f"{part['temperature']:.3g}",
            "pictures": part["rows"],
            "errors": [_cell("ece", part[stage]["ece"], part[stage]["interval"]) for stage in ("before", "after")],
            "chances": [number("ece", part[stage]["by_chance"]) for stage in ("before", "after")],
            "threshold": _threshold(part["threshold"]) if "threshold" in part else None,
            "notes": part["notes"],
            "svg": reliability_chart([part[stage]["bins"] for stage in ("before", "after")]),
        }
        for name, part in parts.items()
    ]
    return {
        "rows": rows,
        "stages": ["as they were", "with the temperature"],
        "saved": all(part["saved"] for part in parts.values()),
        "thresholds": any(row["threshold"] for row in rows),
    }


def _threshold(found: dict[str, Any]) -> dict[str, Any] | None:
    if found["threshold"] is None:
        return None
    others = found.get("two_fold") or {}
    return {
        "value": f"{found['threshold']:.3f}",
        "wanted": None if found["wanted"] is None else f"{found['wanted']:g}",
        "right": None if found["precision"] is None else _cell("precision", found["precision"], found["interval"]),
        "coverage": f"{found['coverage']:.1%}",
        "others": None if others.get("precision") is None else number("precision", others["precision"]),
    }


def _curves(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of what was logged, the losses together."""
    charts = []
    shown = ("R@1", "balanced_accuracy")
    metrics = sorted({name for entry in history for name in entry if name.startswith("eval_") and name.endswith(shown)})
    for title, names in (
        ("Loss", {"loss": "training", "eval_loss": "held-out rows"}),
        ("Learning rate", {"learning_rate": "learning rate"}),
        ("Held-out rows", {name: name.removeprefix("eval_").replace("_", " ") for name in metrics}),
    ):
        series = {
            label: [(entry["step"], entry[name]) for entry in history if name in entry] for name, label in names.items()
        }
        series = {label: points for label, points in series.items() if points}
        if series:
            charts.append({"title": title, "svg": line_chart(series, "step"), "series": list(series)})
    return charts


def _wise_ft(swept: dict[str, Any]) -> dict[str, Any]:
    series = {
        label: [(point["alpha"], point[name]) for point in swept["points"] if name in point]
        for name, label in (("held_out", "held-out rows"), ("control", "control set"))
    }
    series = {label: points for label, points in series.items() if points}
    svg = line_chart(series, "alpha (0: start, 1: fine-tuned)", {f"chosen {swept['alpha']:g}": swept["alpha"]})
    return {**swept, "svg": svg, "series": list(series)}
