"""What MkDocs needs beyond Markdown: pages drawn from the code and the notebooks, and files from outside of docs/.

- ``<!-- commands -->``: every command with its options, as typer has them from the options' dataclasses.
- ``<!-- api -->``: every public name, by package, for mkdocstrings.
- ``<!-- notebook: NAME -->``: notebooks/NAME.ipynb, with its outputs.
- A block of shell followed by one of Python becomes two tabs.
- Pages of the root (CHANGELOG and the like) are pages of the site; links to other files there become their names.
- Pages in how-to/ and notes/ that mkdocs.yml does not name come into the menu by themselves.
- External links are listed, not fetched.
"""

from __future__ import annotations

import ast
import html
import json
import logging
import posixpath
import re
import textwrap
from collections.abc import Iterator
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
    markdown = markdown.replace("<!-- api -->", _api()) if "<!-- api -->" in markdown else markdown
    markdown = re.sub(r"<!-- notebook: (\S+) -->", lambda found: _notebook(found[1]), markdown)
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


def on_post_build(config: MkDocsConfig) -> None:
    """The external links, which nobody fetches here."""
    logger.info("external links, not fetched: %s", ", ".join(sorted(external)) or "none")


# ---- commands ----


def _commands() -> str:
    from clipft.cli import app

    group: Any = typer.main.get_command(app)
    return "\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [param.metavar or str(param.name).upper() for param in _params(command, "argument")]
    lines = [f"## clipft {name}", "", command.help or "", ""]
    if command.epilog:
        lines += ["```bash", *re.findall(r"^  (clipft .*)$", command.epilog, re.MULTILINE), "```", ""]
    lines += [f"Argument: `{' '.join(arguments)}`", ""] if arguments else []
    for heading, params in _grouped(command):
        lines += [f"**{heading}**", ""] if heading else []
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        lines += [_option(param) for param in params] + [""]
    return "\n".join(lines)


def _params(command: Any, kind: str) -> list[Any]:
    """By what they call themselves: their classes are click's or a copy in typer, by its version."""
    return [param for param in command.params if param.param_type_name == kind]


def _grouped(command: Any) -> Iterator[tuple[str, list[Any]]]:
    """Options by the headings of ``--help``, where the command has any."""
    from dataclasses import fields

    from clipft.cli.from_options import Grouped
    from clipft.recipes.options import DATA, GROUPS, MODEL, RUN

    options = _params(command, "option")
    if not options:
        raise ValueError(f"docs/hooks.py: found no options of clipft {command.name}")
    if not isinstance(command, Grouped):
        yield "", options
        return
    headings = {"model": MODEL, "data": DATA}
    headings |= {field.name: field.metadata["group"] for field in fields(command.callback.options_class)}  # type: ignore[union-attr]
    for group in GROUPS:
        own = [param for param in options if (headings.get(str(param.name)) or RUN) == group]
        if own:
            yield group, own


def _option(param: Any) -> str:
    kind = "" if param.is_flag else " ".join(str(c) for c in getattr(param.type, "choices", [])) or param.type.name
    limits = [getattr(param.type, name, None) for name in ("min", "max")]
    if limits != [None, None]:
        low, high = limits
        kind += f", {low} to {high}" if None not in limits else f", from {low}" if high is None else f", to {high}"
    value = getattr(param.default, "value", param.default)
    unset = value in (None, False, (), []) or callable(value)
    default = "required" if param.required else "" if unset else f"`{value}`"
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    return f"| {names} | {kind} | {default} | {_cell(param.help or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


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


# ---- notebooks ----


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
