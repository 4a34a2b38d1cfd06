"""The options of ``clipft explain``. Imports nothing heavy, as ``options``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from clipft.recipes.options import option

__all__ = ["ExplainOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What ``clipft.explain`` and ``clipft explain`` take besides model, pictures, texts and output."""

    threshold: float = option(0.5, "Score above which a place is in a box, between 0 and 1.")
    zoom: float = option(
        4.0,
        "How many times smaller than the picture the windows are that it is seen through: as large as the things that "
        "are looked for. 1: the whole picture at once.",
        least=1.0,
        most=32.0,
    )
    background: Sequence[str] | None = option(
        None, "What the texts compete with, besides each other, in place of the usual; repeat for several."
    )
