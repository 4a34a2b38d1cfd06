"""How tests run the command line."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from clipft.cli import app


def run(*arguments: Any) -> Any:
    """With ``train``, no control set unless one is asked for: most tests have no need of it."""
    if arguments[0] == "train" and not {"--control-data", "--config"} & set(arguments):
        arguments = (*arguments, "--control-data", "none")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
