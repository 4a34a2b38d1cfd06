"""For tests that start a Python of their own. A server forks it, so that libraries are imported once a session, not
once a script; where what a fresh interpreter does is tested, ``sys.executable`` is.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

multiprocessing.set_forkserver_preload(["peft", "clipft.recipes.train", "transformers.trainer"])
_server = multiprocessing.get_context("forkserver")


def import_paths(test: str) -> list[str]:
    """Where a script finds the test module that it belongs to, and what the tests share."""
    return [str(Path(test).parent), str(Path(__file__).parent)]


class Script:
    """Python code that runs as ``python -c`` runs it, with arguments and more of an environment."""

    def __init__(self, code: str, *arguments: object, **environment: str) -> None:
        self._folder = tempfile.mkdtemp()
        own = code, list(map(str, arguments)), environment, self._folder
        self.process = _server.Process(target=_run, args=own)
        self.process.start()

    def finish(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Its end; after so many seconds it is killed."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        said = [Path(self._folder, name).read_text(errors="replace") for name in ("out", "err")]
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess([], self.process.exitcode or 0, *said)


def _run(code: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    for handle, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY), handle)
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # OpenMP looked before the fork
        torch.set_num_threads(int(threads))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
