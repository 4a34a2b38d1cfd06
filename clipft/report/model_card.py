"""README.md beside a model's weights: what it was tuned from and on, what that gained and cost, how to use it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clipft.console import number
from clipft.errors import shown
from clipft.files import expanded, write_text

__all__ = ["write_model_card"]

_HEADLINE = {
    "head": ("accuracy", "balanced_accuracy", "macro_f1"),
    "zero_shot": ("accuracy", "balanced_accuracy", "macro_f1"),
    "retrieval": ("image_to_text_R@1", "text_to_image_R@1"),
}
_TASKS = {
    "head": "image-classification",
    "zero_shot": "zero-shot-image-classification",
    "retrieval": "image-text-retrieval",
}


def write_model_card(
    folder: Path, name: str, report: dict[str, Any], settings: dict[str, Any], *, adapter: bool
) -> None:
    """Write ``folder``/README.md with YAML front matter, as the Hugging Face hub reads it.

    Args:
        folder: with the weights.
        name: of the model.
        report: as in report.json.
        settings: the run's options by name. Of a path only the last part is told.
        adapter: whether the folder holds a LoRA adapter of the base model.
    """
    base, data = _name(settings["model"]), _name(settings["data"])
    name = shown(name)
    card = ModelCardData(
        base_model=settings["model"] if _on_hub(settings["model"]) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "clipft", *(["lora"] if adapter else [])],
        model_name=name,
        eval_results=_results(report, data),
    )
    use = (
        "import clipft\nimport peft\n\n"
        f"base, processor = clipft.load({_string(base)})\nmodel = peft.PeftModel.from_pretrained(base, {_string(name)})"
        if adapter
        else f"import clipft\n\nmodel, processor = clipft.load({_string(name)})  # or AutoModel.from_pretrained"
    )
    parts = [
        f"---\n{card.to_yaml()}\n---",
        f"# {_plain(name)}",
        f"{_plain(base)}, fine-tuned on {_plain(data)} with [clipft](https://pypi.org/project/clipft/).",
        "## Results",
        f"On {report['test']['pictures']} test pictures; in brackets 95 % bootstrap intervals over the pictures.",
        _table(report),
    ]
    parts += [f"{report[name]['note']}." for name in ("frozen", "precision") if name in report]
    if "control" in report:
        control = report["control"]
        about = f"On {_plain(_name(control['data']))} ({control['pictures']} pictures), which it was not tuned on:"
        parts += ["## What it forgot", about, _table(control)]
    if "wise_ft" in report:
        parts.append(
            f"The weights are at alpha = {report['wise_ft']['alpha']:g} between the start (0) and the fine-tuned model "
            f"(1): {report['wise_ft']['rule']}."
        )
    told = {
        key: _told(value) for key, value in settings.items() if value is not None and key not in ("output", "config")
    }
    note = report.get("length", {}).get("note")
    options = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    versions = {"clipft": report["environment"]["clipft"], **report["environment"]["packages"]}
    known = ", ".join(f"{key} {value}" for key, value in versions.items() if value)
    parts += ["## Use", _code("python", use), "## Training", *([f"{note}."] if note else []), _code("yaml", options)]
    parts.append(f"Versions: {known}.")
    write_text(folder / "README.md", str(ModelCard("\n\n".join(parts) + "\n")))


def _on_hub(model: str) -> bool:
    return model != "demo" and model.count("/") <= 1 and not expanded(model).exists()


def _name(source: Any) -> str:
    """A hub name as it is, and of a path the last part: folders are nobody else's business. One line."""
    text = str(source)
    return shown(Path(text).name if Path(text).is_absolute() or expanded(text).exists() else text)


def _told(value: Any) -> Any:
    """An option's value."""
    if isinstance(value, list):
        return [shown(part) if isinstance(part, str) else part for part in value]
    return _name(value) if isinstance(value, str) else value


def _plain(name: str) -> str:
    """A name as it is, without a meaning in Markdown or HTML."""
    return re.sub(r"[\\`*\[\]<>|~$&#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", name)


def _string(name: str) -> str:
    """In Python."""
    return json.dumps(name, ensure_ascii=False)


def _code(language: str, text: str) -> str:
    """A block of it, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _results(report: dict[str, Any], data: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASKS[kind],
            dataset_type=data,
            dataset_name=data,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(report["after"][kind][name], 4),
        )
        for kind, names in _HEADLINE.items()
        for name in names
        if kind in report["after"]
    ]


def _table(report: dict[str, Any]) -> str:
    lines = ["| metric | before | after |", "| --- | ---: | ---: |"]
    for kind, names in _HEADLINE.items():
        for name in names:
            if kind in report["after"]:
                stages = [report[stage][kind] for stage in ("before", "after")]
                cells = [number(name, stage[name], stage["intervals"][name]) for stage in stages]
                of_head = "head, " if kind == "head" else ""
                lines.append(f"| {of_head}{name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)
