"""The command line, a module per group of commands: ``training`` (demo, train), ``evaluation``, ``predict``,
``anomaly``, ``data`` (doctor), ``deploy`` (merge, quantize, export), ``explain``, ``search`` (embed, search), ``env``,
``pages`` (help).
"""

import codecs
import os
import sys

from clipft.cli import training as training  # isort: skip  (--help lists commands in the order of their modules)
from clipft.cli import evaluation as evaluation  # isort: skip
from clipft.cli import predict as predict  # isort: skip
from clipft.cli import anomaly as anomaly  # isort: skip
from clipft.cli import data as data
from clipft.cli import deploy as deploy
from clipft.cli import explain as explain
from clipft.cli import search as search

from clipft.cli import env as env  # isort: skip
from clipft.cli import pages as pages  # isort: skip
from clipft.cli.common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``clipft`` command."""
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":  # names of files are UTF-8 in every locale
        terminal = os.environ.get("PYTHONIOENCODING", sys.stdout.encoding)
        environment = os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": terminal}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    app(prog_name="clipft")
