"""The code blocks of the README, of docs/ and of clipft help do what they say.

Python and clipft's commands run, the blocks of a page in their order, among small pictures and a tiny model under the
names that the pages use. A block that cannot stands under a line ``<!-- fragment: why -->``; one of ``text`` is none.
Options are ones that there are, also of commands that do not run: fragments, other programs', those of ``clipft help``.
"""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from commands import run
from PIL import Image
from tiny_clip import captioned, picture, tiny_clip

import clipft
from clipft.cli import app
from clipft.deploy.export import export_onnx
from clipft.evaluation.resampling import Resampled
from clipft.models.given import given_model
from clipft.recipes.length import length_of_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("clipft/help/*.md"))]
OTHERS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--no-deps", "--help"}  # not clipft's
FENCE = re.compile(r"(?:<!-- fragment: (?P<why>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text()
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(FENCE.findall(text)), f"{path}: a block does not end"
    name = str(path.relative_to(ROOT))
    return [
        Block(name, text[: found.start("code")].count("\n"), found["language"] or "bash", found["code"], found["why"])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = {page: [b for b in BLOCKS if (b.page, b.language) == (page, "bash")] for page in {b.page for b in BLOCKS}}
PYTHON = {
    page: [b for b in BLOCKS if (b.page, b.language, b.why) == (page, "python", None)]
    for page in {b.page for b in BLOCKS}
}
GROUP: Any = typer.main.get_command(app)


def lines_of(code: str) -> list[list[str]]:
    """Commands, as words."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r" && (?=\w)", line)]
    return [own for own in words if own]


def check_command(words: list[str]) -> None:
    """That the command line is one: clipft's by its parser, others by what they name of this repository."""
    if words[0] == "torchrun":
        words = words[words.index("$(which") + 1 :]
        words[0] = words[0].rstrip(")")
    if words[0] == "clipft":
        parse(words[1:])
    elif words[0] == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for one in named for extra in one.split(",")} <= set(extras)
    elif words[0] in {"python", "bash"}:
        assert words[1] == "-m" or (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in {"pytest", "mkdocs", "make", ".ci/run"}, words


def parse(words: list[str]) -> None:
    if words[0].startswith("-") or words[-1] == "--help":
        return
    assert words[0] in GROUP.commands, f"there is no clipft {words[0]}"
    GROUP.commands[words[0]].make_context(f"clipft {words[0]}", words[1:])


def test_every_block_is_python_shell_or_text():
    assert [str(block) for block in BLOCKS if block.language not in {"python", "bash", "text"}] == []
    assert [str(block) for block in BLOCKS if block.why is not None and len(block.why.split()) < 2] == []


def test_a_command_with_an_option_that_there_is_not_is_found():
    with pytest.raises(Exception, match="--epoch"):
        check_command(["clipft", "train", "--model", "demo", "--data", "d", "--output", "o", "--epoch", "3"])
    with pytest.raises(Exception, match="not one of"):
        check_command(["clipft", "train", "--model", "demo", "--data", "d", "--output", "o", "--head", "texts"])


def test_options_in_the_text_are_options_of_a_command():
    params = [param for command in GROUP.commands.values() for param in command.params]
    known = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    pages = [page for page in PAGES if page.parent.name != "notes" and page.name != "coming-from.md"]
    texts = {page: re.sub(FENCE, "", page.read_text()) for page in pages}
    named = {
        (str(page.relative_to(ROOT)), name) for page in pages for name in re.findall(r"`(--[a-z][\w-]*)", texts[page])
    }
    assert sorted(pair for pair in named if pair[1] not in known | OTHERS) == []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, exported):
    """What the pages take for granted: their models and pictures, small."""
    folder = tmp_path_factory.mktemp("reader")
    model, processor = tiny_clip()
    for name in ("openai/clip-vit-base-patch32", "clipft-demo"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    classes = {
        "pictures": ("cat", "dog"),
        "test": ("cat", "dog"),
        "radiographs": ("normal", "pneumonia"),
        "radiographs-new": ("normal", "pneumonia"),
        **dict.fromkeys(("new", "newer", "good", "more", "more-good"), ("",)),
        "bottle": ("train/good", "test/good", "test/crack"),
        "cells": ("intact", "defective"),
    }
    number = 0
    for name, own in classes.items():
        for one in own:
            (folder / name / one).mkdir(parents=True)
            for index in range(1, 13 if name == "pictures" else 7):  # kNN takes 20
                picture(number)[0].save(folder / name / one / f"{index}.jpg")
                number += 1
    (folder / "bottle/ground_truth/crack").mkdir(parents=True)
    for image in (folder / "bottle/test/crack").iterdir():
        mask = Image.fromarray(np.eye(40, 50, dtype=np.uint8) * 255)
        mask.save(folder / f"bottle/ground_truth/crack/{image.stem}_mask.png")
    (folder / "table").mkdir()
    rows = []
    for index in range(12):
        image, caption, colour = picture(index)
        image.save(folder / "table" / f"{index}.jpg")
        rows.append((f"table/{index}.jpg", caption, colour, "" if index % 3 == 0 else ("wood", "steel")[index % 2]))
    for name in ("a", "b"):
        picture(number)[0].save(folder / f"{name}.jpg")
    for name in ("pairs", "test"):
        lines = ["image,title", *(f"{image},{caption} {name}" for image, caption, *_ in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    for name in ("products", "new-products"):
        (folder / f"{name}.csv").write_text("\n".join(["image,caption,color,material", *map(",".join, rows)]) + "\n")
    shutil.copytree(exported[0], folder / "run-onnx")
    clipft.train((model, processor), folder / "pictures", folder / "run", epochs=1, control_data="none")
    return folder


def two_epochs(arguments, *args, **options):
    arguments.num_train_epochs = min(arguments.num_train_epochs, 2)
    return length_of_run(arguments, *args, **{**options, "asked": True})


@pytest.fixture
def quick(monkeypatch, exported):
    """Control set, resamples, epochs and the ONNX export, which other tests take whole, cost nothing here."""
    drawing = Resampled._drawing
    monkeypatch.setattr(Resampled, "_drawing", lambda self, resamples, seed: drawing(self, min(resamples, 20), seed))
    monkeypatch.setattr("clipft.recipes.train.length_of_run", two_epochs)
    monkeypatch.setattr("clipft.recipes.outcome.control_drawings", lambda: captioned(4))

    def export(model, processor=None, directory=None, **options):
        inspect.signature(export_onnx).bind(*given_model(model, processor), directory, **options)
        shutil.copytree(exported[0], directory, dirs_exist_ok=True)
        return exported[1]

    monkeypatch.setattr(clipft, "export_onnx", export, raising=False)
    monkeypatch.setattr("clipft.deploy.export.export_onnx", export)


@pytest.mark.parametrize("page", sorted(page for page, own in PYTHON.items() if own))
def test_python_blocks_run(page, workspace, tmp_path, monkeypatch, quick):
    folder = shutil.copytree(workspace, tmp_path / "reader")
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {}
    for block in PYTHON[page]:
        exec(compile("\n" * block.line + block.code, block.page, "exec"), namespace)


@pytest.mark.parametrize("page", sorted(page for page, own in SHELL.items() if own))
def test_shell_blocks_run(page, workspace, tmp_path, monkeypatch, quick):
    folder = shutil.copytree(workspace, tmp_path / "reader")
    monkeypatch.chdir(folder)
    for block in SHELL[page]:
        for words in lines_of(block.code):
            check_command(words)
            if words[0] == "clipft" and block.why is None and not page.startswith("clipft/help/"):
                result = run(*words[1:])
                may_be = {0, 1} if words[1] == "doctor" else {0}  # 1: it found something
                assert result.exit_code in may_be, f"{block}: {shlex.join(words)}\n{result.output}"
