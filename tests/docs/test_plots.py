"""The plots of the site show what the tables beside them say, in one direction."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
assert spec and spec.loader
plots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plots)


def drawn(name):
    return ElementTree.fromstring(plots.PLOTS[name]())


def test_plots_and_pages_have_the_same_names():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/**/*.md"))
    assert sorted(re.findall(r"<!-- plot: (\S+) -->", pages)) == sorted(plots.PLOTS)


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_stays_within_its_picture_and_has_a_colour_for_each_name(name):
    plot = drawn(name)
    svg = plot.find("svg")
    width, height = (float(side) for side in svg.get("viewBox").split()[2:])
    for attributes in (mark.attrib for mark in svg.iter()):
        assert all(0 <= float(attributes[key]) <= width for key in ("x", "x1", "x2", "cx") if key in attributes)
        assert all(0 <= float(attributes[key]) <= height for key in ("y", "y1", "y2", "cy") if key in attributes)
    keys = {key.get("class") for key in plot.iter("i")}
    used = {mark.get("class").split()[0] for kind in ("rect", "circle", "polyline") for mark in svg.iter(kind)}
    assert used == keys
    style = (ROOT / "docs" / "assets" / "site.css").read_text()
    assert all(f".plot i.{key} " in style for key in keys)


@pytest.mark.parametrize("name", ["contrastive", "lora", "training", "loader", "int8", "gpu_losses", "gpu_layers"])
def test_a_bar_for_each_ratio_to_the_left_of_1_where_clipft_needs_less(name):
    head, rows = plots.table_of(name)
    columns = [column for column, title in enumerate(head) if "/ " in title]
    wanted = [row[column] for row in rows for column in columns]
    svg = drawn(name).find("svg")
    bars = list(svg.iter("rect"))
    values = [bar.find("title").text.rsplit(": ", 1)[1] for bar in bars]
    assert sorted(values) == sorted(wanted)
    assert values == [words.text for words in svg.iter("text") if words.get("class") == "value"]
    one = {float(mark.get("x1")) for mark in svg.iter("line") if mark.get("class") == "one"}
    assert len(one) == 1
    ends = [(float(bar.get("x")), float(bar.get("x")) + float(bar.get("width"))) for bar in bars]
    for value, (left, right) in zip(map(float, values), ends, strict=True):
        assert (right if value < 1 else left) == pytest.approx(one.copy().pop(), abs=0.2)
