"""Commands that make a model ready for use: ``clipft merge``, ``convert``, ``quantize`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from clipft.cli.common import Model, app, examples, output_folder, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options import DataOptions, ScoringOptions, options_from

CheckData = Annotated[
    str | None, typer.Option("--data", help="Data to compare on, as for train; default: embedded drawings.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Layers to leave in float, by parts of their names: visual_projection, fc2, ...; repeatable."),
]
MinCosine = Annotated[
    float,
    typer.Option(min=-1.0, max=1.0, help="Least mean cosine to the float model; below it nothing is written."),
]


@app.command(epilog=examples("clipft merge --model run --output merged"))
@user_errors
def merge(
    *,
    model: Annotated[Path, typer.Option(help="An adapter folder as peft or clipft train --lora-r writes it.")],
    output: Annotated[Path, typer.Option(help="Folder for the plain model.")],
) -> None:
    """Merge a LoRA adapter into its base model and save that as a plain CLIPModel."""
    from clipft.files import locked, settle
    from clipft.models.formats import SEEN_ROWS, is_adapter_folder

    settle(model)
    if not is_adapter_folder(model):
        raise FileNotFoundError(f"--model: expected an adapter folder, with adapter_config.json, got {model}")
    if output_folder(output).resolve() == model.resolve():
        raise ValueError(f"--output: expected a folder other than the adapter's, got {output}")
    console = prepare()
    from clipft.models.loading import load
    from clipft.models.saving import save_model

    with locked(output):
        save_model(*load(model), output, also=[file for file in [model / SEEN_ROWS] if file.is_file()])
    console.print(f"model in {output}")


@app.command(
    epilog=examples(
        "clipft convert run --to open_clip --output run-open-clip",
        "clipft convert open_clip:ViT-B-32/laion2b_s34b_b79k --to hf --output b32",
    )
)
@user_errors
def convert(
    model: Annotated[str, typer.Argument(metavar="SOURCE", help="What --model takes elsewhere.")],
    *,
    to: Annotated[Literal["open_clip", "hf"], typer.Option(help="Whose layout to write.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
) -> None:
    """Write a model as open_clip's or as Hugging Face's: the same weights under other names."""
    output_folder(output)
    console = prepare()
    from clipft.deploy.convert import convert as convert_model

    convert_model(model, output, to=to)
    call = f"open_clip.create_model_and_transforms('local-dir:{output}')" if to == "open_clip" else "clipft.load"
    console.print(f"model in {output}, for {call}", highlight=False)


@app.command(epilog=examples("clipft quantize --model run --output run-int8 --calibrate"))
@user_errors
@takes_options(DataOptions)
def quantize(
    *,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the int8 model, which clipft.load reads.")],
    data: CheckData = None,
    skip: Skip = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Search clipping and smoothing, kept where they lower a layer's error.")
    ] = False,
    min_cosine: MinCosine = 0.99,
    **options: Any,
) -> None:
    """Turn a model's linear layers to int8, and show what that changed."""
    output_folder(output)
    console = prepare()
    from clipft.deploy.quantize import quantize as quantize_model
    from clipft.files import locked
    from clipft.models.int8 import check_own_folder
    from clipft.models.loading import load
    from clipft.models.saving import save_model

    with locked(output):
        check_own_folder(output)
        clip, processor = load(model)
        pairs = _rows_to_compare_on(data, options, console)
        quantized = quantize_model(
            clip, skip=skip or (), inplace=True, data=pairs, processor=processor, calibrate=calibrate
        )
        found = quantized.quantization_report
        low = [kind for kind in ("image", "text") if not found[f"{kind}_cosine"]["mean"] >= min_cosine]
        if not low:
            save_model(quantized, processor, output)
    console.print(_quantization_table(found))
    for kind in low:
        raise ValueError(
            f"--min-cosine: expected at least {min_cosine}, the {kind} tower has "
            f"{found[f'{kind}_cosine']['mean']:.5f}; nothing is written. Try --calibrate, or --skip layers"
        )
    console.print(f"int8 model and quantization_report.json in {output}")


def _rows_to_compare_on(data: str | None, options: dict[str, Any], console: Console) -> Any:
    """The rows of ``--data``, whose account is said."""
    from clipft.recipes.sources import Sources

    settings = options_from(ScoringOptions, options)
    if data is not None:
        return Sources(settings, console).rows("data", data)
    if settings != ScoringOptions():
        raise ValueError("data: expected with the options that say how it is read")
    return None


def _quantization_table(found: dict[str, Any]) -> Table:
    table = Table("", title=f"int8 against float, on {found['pictures']}", title_justify="left")
    table.add_column("mean", justify="right")
    table.add_column("worst", justify="right")
    for kind in ("image", "text"):
        cosine = found[f"{kind}_cosine"]
        table.add_row(f"{kind} embeddings, cosine", f"{cosine['mean']:.5f}", f"{cosine['min']:.5f}")
    errors = {name: layer["error"] for name, layer in found["layers"].items()}
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    table.add_row("a layer's output, relative error", f"{mean:.4f}", f"{errors[worst]:.4f}")
    sizes = found["bytes"]
    table.caption = f"worst layer: {worst}\n{sizes['int8'] / 1e6:.1f} MB, {sizes['float'] / 1e6:.1f} MB in float"
    table.caption_justify = "left"
    return table


@app.command(epilog=examples("clipft export --model run --output run-onnx --int8"))
@user_errors
@takes_options(DataOptions)
def export(
    *,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the encoders and all that it takes to use them.")],
    int8: Annotated[bool, typer.Option("--int8", help="Write int8 encoders beside the float ones.")] = False,
    data: CheckData = None,
    skip: Skip = None,
    min_cosine: MinCosine = 0.99,
    **options: Any,
) -> None:
    """Write a model as two ONNX encoders, and compare them with it."""
    output_folder(output)
    console = prepare()
    from clipft import export_onnx
    from clipft.models.loading import load

    clip, processor = load(model)
    pairs = _rows_to_compare_on(data, options, console)
    with console.status("exporting and comparing"):
        parity = export_onnx(
            clip, processor, output, int8=int8, data=pairs, min_cosine=min_cosine, skip=tuple(skip or ())
        )
    _print_parity(parity, console)
    console.print(f"image and text encoders in {output}; clipft.OnnxCLIP({str(output)!r}) runs them", highlight=False)


def _print_parity(parity: dict[str, Any], console: Console) -> None:
    kinds = [kind for kind in ("torch", "fp32", "int8") if kind in parity]
    table = Table("", title=f"ONNX Runtime against torch, on {parity['data']}", title_justify="left")
    for kind in kinds:
        table.add_column(kind if kind == "torch" else f"ONNX {kind}", justify="right")
    rows: dict[str, Any] = {
        "image embeddings, mean cosine": lambda one: f"{one['image_cosine']['mean']:.5f}",
        "text embeddings, mean cosine": lambda one: f"{one['text_cosine']['mean']:.5f}",
        "same best caption": lambda one: f"{one['top1_agreement']:.1%}",
        "image to text R@1": lambda one: f"{one['retrieval']['image_to_text_R@1']:.3f}",
        "text to image R@1": lambda one: f"{one['retrieval']['text_to_image_R@1']:.3f}",
        "size, MB": lambda one: f"{sum(one['bytes'].values()) / 1e6:.1f}",
        "one picture, ms": lambda one: f"{one['latency_ms']['image']:.2f}",
        "one caption, ms": lambda one: f"{one['latency_ms']['text']:.2f}",
    }
    for name in parity["fp32"]["same_class"]:
        rows[f"same class, {name}"] = lambda one, name=name: f"{one['same_class'][name]:.1%}"
    for name, cell in rows.items():
        table.add_row(name, *(cell(parity[kind]) if kind != "torch" or "R@1" in name else "" for kind in kinds))
    console.print(table)
