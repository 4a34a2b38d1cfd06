"""What runs show in a notebook."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from clipft.console import bar


def test_a_notebook_has_one_line_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell", reason="needs the notebooks extra").InteractiveShell
    lines: list[str] = []
    publisher = shell.instance().display_pub
    monkeypatch.setattr(publisher, "publish", lambda data, *rest, **more: lines.append(data.get("text/html", "")))
    with bar(Console(file=io.StringIO(), force_jupyter=True)) as progress:
        for _ in progress.track(range(3), description="scoring"):
            time.sleep(0.06)  # together more than the first look of the thread that rich would have
    shell.clear_instance()
    assert lines[0] == "" and "scoring" in lines[-1] and "3/3" in lines[-1] and "<pre" in lines[-1]
