"""The notes are dated, listed, and easy to read; links of the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTES = sorted((ROOT / "docs" / "notes").glob("2*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "llms.txt"])


def titled(path):
    return path.read_text().splitlines()[0].removeprefix("# ")


def test_the_index_has_a_line_for_every_note():
    index = (ROOT / "docs" / "notes" / "README.md").read_text()
    rows = re.findall(r"^\| (\S+) \| \[(.+?)\]\((\S+)\) \| \S.* \|$", index, re.MULTILINE)
    assert rows == sorted(rows, key=lambda row: row[0])
    assert sorted(rows) == sorted((note.name[:10], titled(note), note.name) for note in NOTES)


@pytest.mark.parametrize("note", [*NOTES, NOTES[0].with_name("README.md")], ids=lambda note: note.stem)
def test_a_note_asks_a_question_in_lines_that_a_terminal_holds(note):
    assert note.name == "README.md" or titled(note).endswith("?")
    lines = [line for line in note.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) >= 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_a_screen_and_a_half():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) >= 120] == []
