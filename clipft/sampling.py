"""Which rows make a batch. A sampler yields (epoch, index, repeat) in an order that depends on seed and epoch alone,
hence equal on all ranks and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from clipft.data import column_names, mix_seed

__all__ = ["ClassBalancedSampler", "labels_of"]


class ClassBalancedSampler(Sampler[tuple[int, int, int]]):
    """Batches in which classes are as equal in number as can be.

    C classes: every C rows in a row have each class once, in random order. An epoch has as many rows as the data set;
    small classes come round again within it (``repeat`` counts, and gives each time its own augmentation), of large
    ones it takes a random part.

    Args:
        labels: the class of each row.
        seed: of all draws.
        epoch: the number of the coming epoch.
    """

    def __init__(self, labels: Sequence[int], seed: int, epoch: Callable[[], int]) -> None:
        self.seed, self.epoch, self.length = seed, epoch, len(labels)
        values = torch.tensor(labels)
        self.rows_of = [(values == value).nonzero().flatten() for value in values.unique()]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, "balanced"))
        rounds = -(-self.length // len(self.rows_of))
        columns = [_round_robin(rows, rounds, generator) for rows in self.rows_of]
        orders = (torch.randperm(len(columns), generator=generator).tolist() for _ in range(rounds))
        picks = (columns[place][number] for number, order in enumerate(orders) for place in order)
        return ((epoch, index, repeat) for (index, repeat), _ in zip(picks, range(self.length), strict=False))


def _round_robin(rows: torch.Tensor, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """``count`` rows, each permutation to its end before the next, with the number of the permutation."""
    permutations = -(-count // len(rows))
    drawn = [rows[torch.randperm(len(rows), generator=generator)].tolist() for _ in range(permutations)]
    return [(index, repeat) for repeat, part in enumerate(drawn) for index in part][:count]


def labels_of(dataset: Any) -> list[int]:
    """The column ``label``.

    Raises:
        ValueError: there is none.
    """
    names = column_names(dataset)
    if "label" not in names:
        raise ValueError(f"class_balanced: expected a data set with a column 'label', found {sorted(names)}")
    by_column = hasattr(dataset, "column_names")
    return list(dataset["label"]) if by_column else [dataset[index]["label"] for index in range(len(dataset))]
