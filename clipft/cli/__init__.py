"""The command line, a module per group of commands: ``training`` (demo, train), ``evaluation``, ``data`` (doctor),
``deploy`` (merge, quantize, export), ``search`` (embed, search) and ``env``.
"""

from clipft.cli import training as training  # isort: skip  (--help lists commands in the order of their modules)
from clipft.cli import evaluation as evaluation  # isort: skip
from clipft.cli import data as data
from clipft.cli import deploy as deploy
from clipft.cli import search as search

from clipft.cli import env as env  # isort: skip
from clipft.cli.common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``clipft`` command."""
    app(prog_name="clipft")
