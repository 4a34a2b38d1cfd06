"""Arrays in ``.npy`` files, whoever wrote them: what the header says is held against the size before anything is
allocated, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from clipft.errors import line_of

__all__ = ["load_npy"]


def load_npy(path: Path) -> NDArray[np.float32]:
    """[N, D] float32.

    Raises:
        ValueError: it is no such file.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, by_columns, dtype = header(file)
        except Exception as error:  # numpy evaluates the header, and lets out what its tokenizer and parser raise
            raise ValueError(f"{path.name}: its header cannot be read ({line_of(error)})") from error
        if len(shape) != 2 or dtype.kind != "f":
            raise ValueError(f"expected vectors [N, D], got shape {list(shape)} of {dtype}")
        if shape[0] * shape[1] * dtype.itemsize != path.stat().st_size - file.tell():
            raise ValueError(f"{path.name}: {path.stat().st_size} bytes are no array of shape {list(shape)}")
        values = np.fromfile(file, dtype)
    return cast(
        NDArray[np.float32], values.reshape(shape, order="F" if by_columns else "C").astype(np.float32, copy=False)
    )
