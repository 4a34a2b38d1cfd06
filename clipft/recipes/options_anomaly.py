"""The options of ``clipft anomaly``. Imports nothing heavy, as ``options``."""

from __future__ import annotations

import dataclasses

from clipft.recipes.options import DATA, DetectorOptions, option

__all__ = ["AnomalyOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnomalyOptions(DetectorOptions):
    """What ``clipft.anomaly`` and ``clipft anomaly`` take besides model, data and output."""

    extend: bool = option(False, "Add the pictures of --normal to the memory that is there.")
    maps: str | None = option(
        None, "Folder for a map of each picture, as .npy and as .png, under its sub-folder and name."
    )
    on_bad_row: str = option(
        "keep",
        "A picture that cannot be read: it keeps its place, with an error (a normal one is needed); it is left out; or "
        "all ends.",
        DATA,
        choices=("keep", "skip", "error"),
    )
