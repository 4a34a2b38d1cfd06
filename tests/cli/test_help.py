"""Errors that a user can cause have names, and ``clipft help`` their pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import run

import clipft
from clipft.cli import app
from clipft.help import page_of, page_of_message, pages

SOURCES = {path: ast.parse(path.read_text()) for path in Path(clipft.__file__).parent.rglob("*.py")}
OF_LIBRARIES = {  # messages that clipft does not make
    "hub": [
        "no/such is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files",
        "Cannot reach https://huggingface.co/api/models/a/b: offline mode is enabled",
        "You are trying to access a gated repo.",
        "Dataset 'a/b' is a gated dataset on the Hub.",
    ],
    "out-of-memory": [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ...",
    ],
}
NOT_THE_USERS = {"AttributeError", "Exit", "NotImplementedError", "RuntimeError", "SystemExit"}
COMPLETED = (  # parts of messages, which whoever catches them completes
    "<> rows in <> bytes",
    "more than <> MB in <> rows",
    "names <>, which is missing",
    "<> bytes are no array of shape",
    "<> in its description",
    "missing or left over: <>",
    "in <>: <>",
    "int8 model, which comes as it was saved",
)


def words(node: ast.expr) -> str:
    """A message with ``<>`` for what is known at run time only."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return "<>"


def raised() -> Iterator[tuple[str, str, str]]:
    """Place, class and message of whatever clipft raises by ``raise Class(message)``."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                made, arguments = node.exc.func, list(map(words, node.exc.args))
                kind = made.id if isinstance(made, ast.Name) else made.attr if isinstance(made, ast.Attribute) else ""
                message = ": ".join(arguments[:2]) if kind == "BadRowError" else "".join(arguments[:1])
                if kind not in NOT_THE_USERS:
                    yield f"{path.name}:{node.lineno}", kind, message


def test_every_message_leads_to_one_page_that_fits():
    """What no page has the words of is a value that does not fit, and says what is expected."""
    by_class = {name for page in pages().values() for name in page.raised} - {"ValueError", "TypeError"}
    found = list(raised())
    assert len(found) > 500
    for place, kind, message in found:
        named = [page.name for page in pages().values() if page.place_in(message) >= 0]
        assert len(named) <= 1, f"{place}: {message}: {named}"
        own = re.sub(r"^[a-z]+: |<>", "", message)  # of a message that is handed on, nothing
        if not named and kind not in by_class and re.search("[a-z]{2}", own):
            known = "expected" in message or any(part in message for part in COMPLETED)
            assert known, f"{place}: no page of clipft/help has words of {message!r}"


def test_words_that_lead_to_a_page_are_those_of_a_message():
    own = [words(node) for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.expr)]
    said = "\n".join(own) + "\n" + "\n".join(message for messages in OF_LIBRARIES.values() for message in messages)
    for page in pages().values():
        for entry in page.says:
            pattern = ".*?".join(map(re.escape, entry.split("…")))
            assert re.search(pattern, said), f"{page.name}: nothing says {entry!r}"


@pytest.mark.parametrize(("name", "message"), [(name, one) for name, own in OF_LIBRARIES.items() for one in own])
def test_messages_of_libraries(name, message):
    page = page_of_message(message)
    assert page is not None and page.name == name


def test_pages_are_whole_and_names_are_names():
    commands = {info.name or info.callback.__name__ for info in app.registered_commands}
    for name, page in pages().items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name) and name not in commands
        assert page.title and "\n- " in page.text and (page.says or page.raised), name
        assert max(map(len, page.title.splitlines())) <= 100


def test_by_class_and_by_the_cause_in_a_message():
    cut = "row 3: the image cannot be read (90 x 90 pixels, more than max_pixels (--max-pixels) 100)"
    cases = {
        "no-such-file": FileNotFoundError("x"),
        "file-refused": IsADirectoryError("x"),
        "wrong-value": ValueError("lr: expected a number"),
        "out-of-memory": MemoryError("Unable to allocate 8.00 EiB for an array"),
        "picture-too-large": ValueError(cut),
    }
    assert {name: getattr(page_of(error), "name", None) for name, error in cases.items()} == {n: n for n in cases}
    assert page_of(KeyError("x")) is None


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["trian"], "usage"),
        (["--foo"], "usage"),
        (["train", "--epoch", 3], "usage"),
        (["train", "--data", "d"], "usage"),
        (["train", "--batch-size", 0], "wrong-value"),
        (["embed", "--model", "demo", "--output", "o.npy"], "options-together"),
        (["merge", "--model", "/no/model", "--output", "o"], "adapter"),
    ],
)
def test_the_line_ends_with_the_name(command, name):
    result = run(*command)
    assert result.exit_code == 2
    assert result.stderr.rstrip().endswith(f" (clipft help {name})")
    assert run("help", name).output.startswith(pages()[name].title)


def test_too_little_memory_is_one_line_and_other_faults_keep_their_traceback(monkeypatch, tmp_path):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to"),
        RuntimeError("index out of range"),
    ]

    def demo(*args, **options):
        raise errors.pop(0)

    monkeypatch.setattr("clipft.demo.run", demo)
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr.startswith("error: CUDA out of memory") and "(clipft help out-of-memory)" in result.stderr
    with pytest.raises(RuntimeError, match="index out of range"):
        run("demo", "--output", tmp_path)


def test_help():
    listed = run("help").output
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in pages())
    page = run("help", "missing-column").output
    assert "```" not in page and "\n    clipft train --model" in page
    assert run("help", "--data: expected a column with images, found 'a'").output == page
    assert "](" not in run("help", "unsupported-model").output
    assert "--early-stopping-patience" in run("help", "train").output
    wrong = run("help", "misssing-colum")
    assert wrong.exit_code == 2 and "did you mean missing-column" in wrong.stderr
