"""``clipft help``: what an error means and what to do about it, offline."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

import typer

from clipft.cli.common import app, examples, user_errors
from clipft.help import Page, page_of_message, pages

__all__: list[str] = []


@app.command(
    name="help",
    context_settings={"ignore_unknown_options": True},  # messages begin with the option that they are about
    epilog=examples("clipft help", "clipft help missing-column", "clipft help train"),
)
@user_errors
def show_help(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="What an error ends with; or a command, or an error's message in quotes."),
    ] = None,
) -> None:
    """What an error means and what to do about it, by its name; without one all names."""
    name = " ".join(words or ())
    group: Any = context.parent and context.parent.command
    if not name:
        width = max(map(len, pages()))
        typer.echo("\n".join(f"{page.name:{width}}  {page.title}" for page in pages().values()))
    elif name in group.commands:
        with group.commands[name].make_context(f"clipft {name}", [], parent=None, resilient_parsing=True) as own:
            typer.echo(own.get_help())
    elif page := pages().get(name) or page_of_message(name):
        typer.echo(_plain(page))
    else:
        near = difflib.get_close_matches(name, [*pages(), *group.commands], cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"NAME: expected one of those that clipft help lists, got {name!r}{hint}")


def _plain(page: Page) -> str:
    """Without the marks of Markdown that say nothing in a terminal."""
    parts = re.split(r"^```\w*\n(.*?)^```$", page.text, flags=re.MULTILINE | re.DOTALL)  # every second one is code
    parts[1::2] = [re.sub("^", "    ", code.rstrip(), flags=re.MULTILINE) for code in parts[1::2]]
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", f"{page.title}\n\n{''.join(parts)}".rstrip())
