"""The tables of the pages are those that the benchmarks' results give, and a page that differs is found."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
tables = importlib.import_module("tables")
sys.path.pop(0)

PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))


@pytest.fixture
def page(tmp_path):
    """All of them in one."""
    path = tmp_path / "page.md"
    path.write_text("\n".join(page.read_text() for page in PAGES))
    return path


def test_the_pages_hold_what_the_results_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_in_a_page():
    pages = "".join(path.read_text() for path in PAGES)
    assert [name for name in tables.TABLES if f"<!-- table: {name} -->" not in pages] == []


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_changed_figure_is_found_and_mended(name, page, capsys):
    right = page.read_text()
    drawn = tables.TABLES[name]()
    last = drawn.splitlines()[-1]
    page.write_text(right.replace(last, last[:-8] + "9" + last[-7:]))
    assert tables.main(["--check", str(page)]) == 1
    assert f"+{last}\n" in capsys.readouterr().out
    assert tables.main([str(page)]) == 0
    assert page.read_text() == right


def test_checking_writes_nothing(page):
    wrong = page.read_text().replace("torch 2.", "torch 1.")
    page.write_text(wrong)
    assert tables.main(["--check", str(page)]) == 1
    assert page.read_text() == wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: speed -->\n<!-- /table -->\n", "no table 'speed'"),
        ("<!-- table: lora -->\n", "needs a <!-- /table -->"),
        ("<!-- table: lora -->\n<!-- table: int8 -->\n<!-- /table -->\n", "needs a <!-- /table -->"),
        ("text <!-- table: lora -->\n<!-- /table -->\n", "needs a <!-- /table -->"),
        ("<!-- /table -->\n", "needs a <!-- /table -->"),
    ],
)
def test_markers_that_draw_nothing_are_an_error(text, message, page):
    page.write_text(text)
    with pytest.raises(SystemExit, match=message):
        tables.main(["--check", str(page)])
