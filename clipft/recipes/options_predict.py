"""What ``clipft.predict`` and ``clipft predict`` take besides model, data and output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from clipft.recipes.options import DATA, DataOptions, option

__all__ = ["PredictOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(DataOptions):
    """Options of predict."""

    classes: Sequence[str] | None = option(
        None,
        "Classes to choose from, told by their names: a,b or a file with a line each; or repeat. Default: the model's "
        "head, else the classes of its run.",
    )
    template: Sequence[str] | None = option(
        None, "Caption of a class that is told by its name, with one {}; repeat for several. Default: the run's."
    )
    head: Sequence[str] | None = option(
        None, "Of a model with several heads, the one to ask: label or an attribute; repeat for several."
    )
    top: int = option(1, "So many best classes of a picture.", least=1)
    threshold: float | None = option(
        None,
        "A picture whose best class has a lower probability is unknown. Default: what --precision-at chose, else 0.",
        least=0.0,
        most=1.0,
    )
    batch_size: int = option(64, "Pictures at a time.", least=1)
    workers: int = option(0, "Processes that load pictures.", least=0)
    int8: bool = option(False, "Of an ONNX folder, take the int8 encoders.")
    threads: int | None = option(None, "That run the model; default: one a core that is free to us.", least=1)
    id_column: str | None = option(None, "Column that names the pictures; default: their paths, else SOURCE:ROW.", DATA)
    on_bad_row: str = option(
        "keep",
        "A picture that cannot be read: it keeps its place, with an error; it is left out; or all ends.",
        DATA,
        choices=("keep", "skip", "error"),
    )
    restart: bool = option(False, "Forget what an interrupted run left.")
