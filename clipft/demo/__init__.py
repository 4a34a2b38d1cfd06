"""``clipft demo``: what fine-tuning does, on pictures and a base model inside the package, offline.

The base model has learnt Noto's drawings of every emoji (``clipft.demo.pretrain``). The fine-tune shows it OpenMoji's
drawings of most of them and tests on OpenMoji's drawings of the rest: names that it knows from Noto, in a style that it
has not seen them in. Beside it a model with random weights takes the same steps, and the old style is tested again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from clipft.console import gain

if TYPE_CHECKING:
    import datasets

    from clipft.evaluation.scoring import Found

__all__ = ["run"]

EPOCHS = 3.5  # each model; two minutes and a half on two cores without AVX-512
QUERIES = ("french fries", "teddy bear", "woman biking", "cloud with rain", "crown")  # four found, of all 2 in 3


def run(output: str | Path, console: Console) -> dict[str, Any]:
    """Fine-tune the embedded model on a new drawing style, print what it gained, and save model, report and picture.

    Args:
        output: folder for the model (as ``save_pretrained`` writes it), ``report.json`` and ``queries.png``.
        console: where to print.

    Returns:
        What ``report.json`` holds: ``before``, ``after``, ``gain`` (``value`` and 95 % ``interval``) and
        ``from_scratch`` on the new style, ``old_style`` (``before``, ``after``, ``gain``); each with ``retrieval``.

    Raises:
        ImportError: the packages of the ``demo`` extra are missing.
    """
    from clipft.demo.gallery import draw_queries
    from clipft.demo.styles import noto, openmoji, split_by_name
    from clipft.evaluation.scoring import gains
    from clipft.files import locked, write_json
    from clipft.models.formats import model_set
    from clipft.models.fusing import unfuse
    from clipft.models.loading import load
    from clipft.models.saving import write_model

    folder = Path(output)
    model, processor = load("demo")
    console.print(
        f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, which know Noto's drawings"
    )
    train, test = split_by_name(openmoji())
    console.print(
        f"new style: {len(train)} OpenMoji drawings to train on, {len(test)} drawings of other names to test on"
    )
    base, _ = load("demo")
    with locked(folder):
        before = _score(base, processor, test, "before", console)
        _, old_style = split_by_name(noto())
        old = _score(base, processor, old_style, "before, old style", console)
        fine_tune(model, processor, train, folder, "fine-tuning", console)
        after = _score(model, processor, test, "after", console)
        old_after = _score(model, processor, old_style, "after, old style", console)
        scratch = random_weights(model.config)
        fine_tune(scratch, processor, train, folder, "from scratch", console)
        results = {
            "before": before.to_json(),
            "after": after.to_json(),
            "gain": gains(before, after),
            "from_scratch": _score(scratch, processor, test, "from scratch", console).to_json(),
            "old_style": {"before": old.to_json(), "after": old_after.to_json(), "gain": gains(old, old_after)},
        }
        with model_set(folder) as staging:
            write_model(unfuse(model), processor, staging)
            write_json(staging / "report.json", results)
            draw_queries(staging / "queries.png", {"before": base, "after": model}, processor, test, QUERIES)
    show(results, len(test), console)
    console.print(f"\nmodel, report.json and queries.png in {folder}")
    return results


def _score(model: Any, processor: Any, dataset: datasets.Dataset, stage: str, console: Console) -> Found:
    """What the model finds; its recall is on the screen at once."""
    from clipft.data.rows import DEFAULT_TEMPLATES
    from clipft.evaluation.scoring import Scorer

    found = Scorer(model, processor, dataset, list(DEFAULT_TEMPLATES), 64, 0, console)(stage)
    recall = found.main.metrics()
    shown = [f"{way.replace('_', ' ')} R@5 {recall[f'{way}_R@5']:.3f}" for way in ("image_to_text", "text_to_image")]
    console.print(f"{stage}: {', '.join(shown)}", highlight=False)
    return found


def random_weights(config: Any) -> Any:
    """A model of the same shape that has seen nothing."""
    import torch
    from transformers import CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return CLIPModel(config)


def fine_tune(model: Any, processor: Any, train: datasets.Dataset, folder: Path, title: str, console: Console) -> None:
    """The steps that both models take."""
    import torch
    from transformers.trainer_callback import PrinterCallback

    from clipft.training.arguments import CLIPTrainingArguments
    from clipft.training.progress import ProgressReport
    from clipft.training.trainer import CLIPTrainer

    arguments = CLIPTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        num_train_epochs=EPOCHS,
        learning_rate=5e-4,
        random_resized_crop=0.8,
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = CLIPTrainer(model, arguments, train_dataset=train, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReport(console, title))
    trainer.train()


def show(results: dict[str, Any], count: int, console: Console) -> None:
    """Two tables: the new style, and what the fine-tune cost of the old one."""
    console.print(_table(f"OpenMoji: {count} drawings whose names the fine-tune did not see", results))
    console.print(_table("Noto, the old style: the same names", results["old_style"]))


def _table(title: str, stages: dict[str, Any]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", caption="in brackets: 95 % bootstrap interval of the gain")
    for heading in ("", "before", "after", "gain", *(["from scratch"] if "from_scratch" in stages else [])):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    before, after, gained = (stages[name]["retrieval"] for name in ("before", "after", "gain"))
    for name in (name for name in before if "_R@" in name):
        cells = [f"{before[name]:.3f}", f"{after[name]:.3f}"]
        gap = gain(name, **gained[name])
        scratch = [f"{stages['from_scratch']['retrieval'][name]:.3f}"] if "from_scratch" in stages else []
        table.add_row(name.replace("_", " "), *cells, gap, *scratch)
    return table
