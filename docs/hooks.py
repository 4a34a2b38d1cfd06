"""What MkDocs needs beyond Markdown: pages drawn from the code and the notebooks, and files from outside of docs/.

- ``<!-- commands -->``: every command with its options, as typer has them from the options' dataclasses.
- ``<!-- errors -->``: the pages of ``clipft help``, and which words of a message lead to them.
- ``<!-- api -->``: every public name, by package, for mkdocstrings.
- ``<!-- notebook: NAME -->``: notebooks/NAME.ipynb, with its outputs.
- ``<!-- plot: NAME -->``: an SVG of docs/plots.py, from the benchmarks' results.
- From ``<!-- clone -->`` to ``<!-- /clone -->``: for who reads the file itself, and not on the site.
- A block of shell followed by one of Python becomes two tabs.
- Pages of the root (CHANGELOG and the like) are pages of the site; links to other files there become their names.
- Pages in how-to/ and notes/ that mkdocs.yml does not name come into the menu by themselves.
- External links are listed, not fetched.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib.util
import inspect
import json
import logging
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {f"{name}.md": f"project/{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "ARCHITECTURE")}
OUTSIDE |= {"SECURITY.md": "project/security.md", "docs/notes/README.md": "notes/README.md"}
GROUPS = {
    "recipes": "Whole jobs",
    "data": "Data",
    "models": "Models",
    "training": "Training",
    "evaluation": "Evaluation",
    "inference": "Embeddings, classes and search",
    "deploy": "int8, ONNX, open_clip",
    "ops": "Ops",
}
FENCE = r"^```{}\n((?:(?!```).*\n)*)```$"
TABS = re.compile(FENCE.format("(?:bash|sh)") + r"\n\n" + FENCE.format("python"), re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")
logger = logging.getLogger("mkdocs.hooks.clipft")
external: set[str] = set()
_WORDS = 4  # of a kind of error, in the table of messages


# ---- the menu and the files ----


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that mkdocs.yml does not name, after those of their folder that it does."""
    for section in config.nav or []:
        if "How-to" in section:
            named = section["How-to"]
            named += sorted(f"how-to/{page.name}" for page in Path(config.docs_dir, "how-to").glob("*.md"))
            section["How-to"] = list(dict.fromkeys(named))
        if "Explanation" in section:
            notes = sorted(f"notes/{page.name}" for page in Path(config.docs_dir, "notes").glob("2*.md"))
            next(part for part in section["Explanation"] if "Notes" in part)["Notes"] += notes
    (config.nav or []).append({"Project": [page for page in OUTSIDE.values() if page.startswith("project/")]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """With the pages of the root."""
    for name, page in OUTSIDE.items():
        if page.startswith("project/"):
            files.append(File.generated(config, page, content=_moved((ROOT / name).read_text(), page)))
    return files


def _moved(text: str, page: str) -> str:
    """Markdown of the root, with links as they are from the site's page."""

    def link(found: re.Match[str]) -> str:
        target = OUTSIDE.get(found[2], found[2].removeprefix("docs/"))
        inside = found[2] in OUTSIDE or found[2].startswith("docs/")
        return f"[{found[1]}]({posixpath.relpath(target, posixpath.dirname(page))})" if inside else found[1]

    return re.sub(r"\[([^\]]*)\]\(([^):#\s]+)\)", link, text)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What the markers stand for, tabs, and links that lead out of docs/."""
    markdown = markdown.replace("<!-- commands -->", _commands()) if "<!-- commands -->" in markdown else markdown
    markdown = markdown.replace("<!-- errors -->", _errors()) if "<!-- errors -->" in markdown else markdown
    markdown = markdown.replace("<!-- api -->", _api()) if "<!-- api -->" in markdown else markdown
    markdown = re.sub(r"<!-- notebook: (\S+) -->", lambda found: _notebook(found[1]), markdown)
    markdown = re.sub(r"<!-- plot: (\S+) -->", lambda found: _plot(found[1]), markdown)
    markdown = re.sub(r"<!-- clone -->.*?<!-- /clone -->\n", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^<!-- fragment: .*? -->\n", "", markdown, flags=re.MULTILINE)
    external.update(re.findall(r"\]\((https?://[^)\s]+)\)", markdown))
    here = posixpath.dirname(page.file.src_uri)
    return TABS.sub(_tabs, LINK.sub(lambda found: _link(found, here), markdown))


def _link(found: re.Match[str], here: str) -> str:
    """One that leads out of docs/ to where its page is on the site, or to its name alone."""
    target = posixpath.normpath(posixpath.join("docs", here, found[3], found[4]))
    if target.startswith("docs/"):
        return found[0]
    if target in OUTSIDE:
        return f"[{found[2]}]({posixpath.relpath(OUTSIDE[target], here)}{found[5] or ''})"
    return f"{found[2]} (`{target}`)"


def _tabs(found: re.Match[str]) -> str:
    shell, python = (textwrap.indent(found[i], "    ") for i in (1, 2))
    return f'=== "Shell"\n\n    ```bash\n{shell}    ```\n\n=== "Python"\n\n    ```python\n{python}    ```'


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names in docstrings without the roles that Sphinx would read; code in tables that breaks between words alone."""
    html = re.sub(r":(?:func|class|mod|meth|attr|exc):(?=<code)", "", html)
    return re.sub(
        r"<td\b.*?</td>", lambda cell: re.sub(r"<code>([^<]* [^<]*)</code>", _words, cell[0]), html, flags=re.S
    )


def _words(found: re.Match[str]) -> str:
    return f"<code>{' '.join(f'<span>{word}</span>' for word in found[1].split(' '))}</code>"


def on_post_build(config: MkDocsConfig) -> None:
    """The external links, which nobody fetches here."""
    logger.info("external links, not fetched: %s", ", ".join(sorted(external)) or "none")


# ---- commands ----


def _commands() -> str:
    from clipft.cli import app

    return "\n".join(_command(info) for info in app.registered_commands)


def _command(info: Any) -> str:
    """From the signature of the command, which is ours: what typer makes of it differs between its versions."""
    name = info.name or info.callback.__name__
    parameters = inspect.signature(info.callback, eval_str=True).parameters.values()
    given = [p for p in parameters if _is(p, typer.models.ArgumentInfo)]
    arguments = [p.annotation.__metadata__[0].metavar or p.name.upper() for p in given]
    options = [p for p in parameters if _is(p, typer.models.OptionInfo)]
    if not options and not arguments:
        raise ValueError(f"docs/hooks.py: found no options of clipft {name}")
    lines = [f"## clipft {name}", "", inspect.cleandoc(info.callback.__doc__), ""]
    if info.epilog:
        lines += ["```bash", *re.findall(r"^  (clipft .*)$", info.epilog, re.MULTILINE), "```", ""]
    lines += [f"Argument: `{' '.join(arguments)}`", ""] if arguments else []
    for heading, own in _grouped(info, options):
        lines += [f"**{heading}**", ""] if heading else []
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        lines += [_option(parameter) for parameter in own] + [""]
    return "\n".join(lines)


def _is(parameter: inspect.Parameter, kind: type) -> bool:
    return isinstance(getattr(parameter.annotation, "__metadata__", (None,))[0], kind)


def _grouped(info: Any, options: list[inspect.Parameter]) -> Iterator[tuple[str, list[inspect.Parameter]]]:
    """Options by the headings of ``--help``, where the command has any."""
    from clipft.cli.from_options import Grouped
    from clipft.recipes.options import DATA, GROUPS, MODEL, RUN

    if info.cls is not Grouped:
        if options:
            yield "", options
        return
    headings = {"model": MODEL, "data": DATA}
    headings |= {field.name: field.metadata["group"] for field in dataclasses.fields(info.callback.options_class)}
    for group in GROUPS:
        if own := [parameter for parameter in options if (headings.get(parameter.name) or RUN) == group]:
            yield group, own


def _option(parameter: inspect.Parameter) -> str:
    about, value = parameter.annotation.__metadata__[0], parameter.default
    kind = parameter.annotation.__origin__
    flags = [flag for flag in (about.default, *(about.param_decls or ())) if str(flag).startswith("-")]
    names = ", ".join(f"`{flag}`" for flag in flags or ["--" + parameter.name.replace("_", "-")])
    limits = [f"{word} {limit:g}" for word, limit in (("from", about.min), ("to", about.max)) if limit is not None]
    required = value is inspect.Parameter.empty
    value = getattr(value, "value", value)
    default = "required" if required else "" if value is None or value is False else f"`{value}`"
    return f"| {names} | {' '.join([_takes(kind), *limits])} | {default} | {_cell(about.help or '')} |"


def _takes(kind: Any) -> str:
    """In words; of a switch nothing."""
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) is list:
        return "text, repeatable"
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if inner:
        return _takes(inner[0])
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return {bool: "", int: "whole number", float: "number", Path: "path"}.get(kind, "text")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


# ---- errors ----


def _errors() -> str:
    """By message, then the pages."""
    from clipft.help import pages

    known = list(pages().values())
    lines = ["| name | the message says |", "| --- | --- |"]
    for page in known:
        says = ", ".join(f"`{words}`" for words in page.says[:_WORDS]) or "anything else"
        lines.append(f"| [{page.name}](#{page.name}) | {_cell(says)} |")
    for page in known:
        lines += ["", f"## {page.name}", "", f"**{page.title}.** {page.text}"]
    return "\n".join(lines)


# ---- Python ----


def _api() -> str:
    """By the packages that hold what ``clipft`` exports; read, not imported."""
    tree = ast.parse((ROOT / "clipft" / "__init__.py").read_text())
    places = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_MODULE_OF"
    )
    lines = []
    for package, title in GROUPS.items():
        own = [name for name, module in places.items() if module.split(".")[1] == package]
        lines += [f"## {title}", ""] if own else []
        for name in own:
            lines += [f"::: {_defined(places[name], name)}", ""]
    if odd := sorted({module for module in places.values() if module.split(".")[1] not in GROUPS}):
        raise ValueError(f"docs/hooks.py: GROUPS has no title for what is in {', '.join(odd)}")
    return "\n".join(lines)


def _defined(module: str, name: str) -> str:
    """Where a name is defined, which a package may import from a module of its own."""
    folder = ROOT / Path(*module.split("."))
    if not (folder / "__init__.py").is_file():
        return f"{module}.{name}"
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return f"{node.module}.{name}"
    return f"{module}.{name}"


# ---- plots and notebooks ----


def _plot(name: str) -> str:
    """Of docs/plots.py, which is not on the path of a hook."""
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
    assert spec and spec.loader
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    return str(plots.PLOTS[name]())


def _notebook(name: str) -> str:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^# .*\n", "", source))
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell.get("outputs", []) if (shown := _output(output))]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    """HTML on lines that Markdown leaves as they are; the richest form of an output."""
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    if "image/png" in data:
        body = f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">'
    elif (page := data.get("text/html", "")) and len(page) > 20_000:  # a whole report, which has styles of its own
        body = f'<iframe loading="lazy" srcdoc="{html.escape(page)}"></iframe>'
    elif page:
        body = page
    else:
        text = data.get("text/plain") or "".join(output.get("text", ""))
        body = f"<pre>{html.escape(text)}</pre>" if text.strip() else ""
    return f'<div class="output">{body}</div>' if body else ""
