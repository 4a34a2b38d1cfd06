"""What the commands share: the app, options, and how errors and progress are shown.

Heavy imports wait inside the commands, so that ``clipft --help`` answers at once. An error of the user's prints one
line and ends with status 2.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from clipft import __version__
from clipft.console import PlainConsole, console_of_run, log_to_terminal
from clipft.errors import line_of, shown
from clipft.files import check_folder
from clipft.help import page_of
from clipft.recipes.options import TrainOptions, own_names

__all__ = [
    "AnyModel",
    "Data",
    "Model",
    "Workers",
    "app",
    "examples",
    "output_folder",
    "prepare",
    "user_errors",
]


def examples(*lines: str) -> str:
    """For the end of a command's help: command lines as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or that of typer's own copy of click


class _Group(TyperGroup):
    """Errors of the command line itself end with the name of their page too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The options before a command; of no words at all, the help."""
        if not args:
            return super().parse_args(ctx, args)
        with _usage_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """The command, with its options."""
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        _name_options_of_others(error)
        message = f"{error.format_message()} {_page(error)}"  # type: ignore[attr-defined]
        error.format_message = lambda: message  # type: ignore[attr-defined]
        raise


def _name_options_of_others(error: Any) -> None:
    """Of an option that is called so in transformers or peft, the command's own is the one that is meant."""
    if not hasattr(error, "possibilities") or error.ctx is None:
        return
    name = error.option_name.lstrip("-").replace("-", "_")
    known = {flag for parameter in error.ctx.command.params for flag in parameter.opts}
    meant = [f"--{own.replace('_', '-')}" for own in (*_OPTIONS.get(name, ()), own_names().get(name, ""))]
    error.possibilities = sorted(known.intersection(meant)) or error.possibilities


def _page(error: BaseException) -> str:
    """Where there is more about an error."""
    page = page_of(error)
    return f"(clipft help {page.name})" if page else ""


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    help="Fine-tune, evaluate and deploy CLIP models.",
    epilog=examples(
        "clipft demo",
        "clipft train --model openai/clip-vit-base-patch32 --data pictures/ --output run",
        "clipft evaluate --model run --data test.csv",
    ),
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"clipft {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Model = Annotated[
    str, typer.Option(help="A folder as save_pretrained writes it, an adapter folder, a hub name, or demo.")
]
AnyModel = Annotated[
    str, typer.Option("--model", help="As for evaluate, or a folder that clipft export wrote, which ONNX Runtime runs.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Folder with a sub-folder a class, .csv/.tsv/.jsonl/.parquet file, .tar shards, or a data set's name."
    ),
]


Workers = Annotated[int, typer.Option(min=0, help="Processes that load and augment pictures.")]


# of arguments that have another name on the command line, the options that may be meant
_OPTIONS: dict[str, tuple[str, ...]] = {
    **{field.metadata["argument"]: (field.name,) for field in fields(TrainOptions) if "argument" in field.metadata},
    "alpha": ("lora_alpha",),
    "attribute_columns": ("attribute",),
    "attributes": ("attribute",),
    "caption_templates": ("template",),
    "dataset": ("data",),
    "dropout": ("lora_dropout",),
    "eval_dataset": ("eval_data",),
    "k": ("knn_k",),
    "metric_for_best_model": ("metric",),
    "name_or_path": ("model",),
    "path_or_name": ("data",),
    "r": ("lora_r",),
    "resume_from_checkpoint": ("resume",),
    "targets": ("lora_targets",),
    "templates": ("template",),
    "test_dataset": ("data",),
    "train_dataset": ("probe_data", "data"),
}


_LONGEST = 4000  # characters of a message; some hold what a file holds
_OF_THE_MACHINE = ("out-of-memory", "needs-gpu")  # pages of what a RuntimeError may say that is no fault of ours


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what went wrong with the input as one line; anything else keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
            if not (message := _said(error)):
                raise
            said = f"{shown(_as_options(message, _flags(command)))} {_page(error)}"
            PlainConsole(stderr=True).print(Text.assemble(("error: ", "red"), said))
            raise typer.Exit(2) from error

    return guarded


def _said(error: Exception) -> str:
    """The message; of an error in a loader's process, where torch adds the traceback to the message, the last line.
    Of a RuntimeError nothing, unless it is about such a process that was killed, or about the machine.
    """
    if isinstance(error, RuntimeError):
        from clipft.training.faults import worker_death

        page = page_of(error)
        return worker_death(error) or (line_of(error) if page and page.name in _OF_THE_MACHINE else "")
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        return lines[-1].partition(": ")[2]
    return line_of(error, _LONGEST)


def _flags(command: Callable[..., None]) -> dict[str, str]:
    """A command's options as they are typed, by its arguments' names; what is typed without an option by its name."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        metadata = getattr(parameter.annotation, "__metadata__", ())
        given = [flag for one in metadata for flag in (one.default, *(one.param_decls or ()))]  # as typer keeps them
        flags = [flag for flag in given if isinstance(flag, str) and flag.startswith("--")]
        positional = any(isinstance(one, typer.models.ArgumentInfo) for one in metadata)
        found[name] = name if positional else flags[0] if flags else "--" + name.replace("_", "-")
    return found


def _as_options(message: str, flags: Mapping[str, str]) -> str:
    """With the command's arguments as its options: those that the message begins with, and those with a _ anywhere."""

    def option(name: str) -> str | None:
        return next((flags[own] for own in (name, *_OPTIONS.get(name, ())) if own in flags), None)

    names, colon, rest = message.partition(": ")
    options = [option(name) for name in names.split(", ")]
    if colon and None not in options:
        names = ", ".join(map(str, options))
    return re.sub(
        r"(?<![\w.'\"/-])([a-z]+(?:_[a-z]+)+)(?:=True)?(?![\w(.'\"/=])(?: \(--[a-z-]+\))?",
        lambda word: option(word[1]) or word[0],
        names + colon + rest,
    )


def prepare() -> Console:
    """Quiet libraries, and the console to print on."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF and the like
    log_to_terminal()
    return console_of_run()


def output_folder(output: Path) -> Path:
    """``--output`` where a folder is to be written."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: expected a folder, {output} is a file")
    check_folder(output)
    return output
