"""What clipft knows of the machine that it runs on."""

from __future__ import annotations

import os

import pytest

from clipft.environment import environment, usable_cores


def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)  # as in a container
    assert usable_cores() == environment()["usable_cores"] == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
