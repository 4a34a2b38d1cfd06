"""The reports that are shown are those of the commands beside them, small, and ask nothing of another place."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
assert spec and spec.loader
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)

PAGES = {path.stem: path.read_text() for path in gallery.GALLERY.glob("*.html")}


def test_each_command_has_its_page_and_each_page_its_command():
    index = (gallery.GALLERY / "index.md").read_text()
    assert sorted(PAGES) == sorted(gallery.commands())
    assert re.findall(r'<iframe loading="lazy" src="(\w+)\.html"', index) == list(gallery.commands())
    assert re.findall(r"\[The page\]\((\w+)\.html\)", index) == list(gallery.commands())


def test_pages_hold_what_they_show():
    for page in PAGES.values():
        assert len(page.encode()) <= gallery.LARGEST
        assert "data:image/" in page
        assert re.findall(r"<(?:script|link)\b|\bsrc=\"(?!data:)|url\(", page) == []
        assert re.findall(r"/(?:home|tmp|root|work)/[^<\s]*", page) == []


def test_a_page_names_the_data_of_its_command():
    for name, line in gallery.commands().items():
        data = line[line.index("--data") + 1]
        assert data in PAGES[name]
