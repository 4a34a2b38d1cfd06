"""The options of ``clipft anomaly``. Imports nothing heavy, as ``options``."""

from __future__ import annotations

import dataclasses

from clipft.recipes.options import DetectorOptions, option

__all__ = ["AnomalyOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnomalyOptions(DetectorOptions):
    """What ``clipft.anomaly`` and ``clipft anomaly`` take besides model, data and output."""

    extend: bool = option(False, "Add the pictures of --normal to the memory that is there.")
    maps: str | None = option(
        None, "Folder for a map of each picture, as .npy and as .png, under its sub-folder and name."
    )
