"""Which rows make a batch. A sampler yields (epoch, index, repeat) in an order that depends on seed and epoch alone,
hence equal on all ranks and after a resume.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import Sampler

from clipft.data.rows import MISSING, class_names_of, class_targets, column_names, column_values

__all__ = [
    "UNEVEN",
    "AllButLast",
    "ClassBalancedSampler",
    "EpochSampler",
    "HardNegativeSampler",
    "classes_are_uneven",
    "hardest",
    "labels_of",
    "mix_seed",
    "positives_of_each_other",
]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in an order that depends on seed and epoch alone, hence equal on all ranks and after a
    resume.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(mix_seed(self.seed, epoch, "order"))
        )
        return ((epoch, index) for index in order.tolist())


class AllButLast(Sampler[Any]):
    """A sampler's rows but for the last, in every epoch another, which would be a batch of its own."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.rows, len(self))


def mix_seed(*parts: Any) -> int:
    """A 64-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


UNEVEN = 1.5  # largest over smallest class
_MOST_TIMES = 10


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
        ValueError: there is none, or it does not have a class for every row.
    """
    names = column_names(dataset)
    if "label" not in names:
        raise ValueError(f"class_balanced: expected a data set with a column 'label', found {sorted(names)}")
    labels = column_values(dataset, "label")
    missing = sum(label in (None, -1, MISSING) for label in labels)
    if missing:
        raise ValueError(
            f"class_balanced: expected a class in every row, found {missing} of {len(labels)} without (None or -1): "
            "leave these rows out, or draw without class_balanced"
        )
    return labels


def classes_are_uneven(dataset: Any, batch_size: int) -> bool:
    """Whether drawing by class is a good default: captions are made of the classes, every row has one, a batch has room
    for all of them, and the largest has more than 1.5 times the rows of the smallest, whose rows would come at most
    ten times an epoch.
    """
    names = class_names_of(dataset)
    if not names or "caption" in column_names(dataset):
        return False
    classes, counts = np.unique(class_targets(dataset, "label", names), return_counts=True)
    if MISSING in classes or len(classes) > batch_size:
        return False
    times = counts.mean() / counts.min()  # the smallest class's rows in an epoch
    return bool(counts.max() > UNEVEN * counts.min() and times <= _MOST_TIMES)


# ---- mined hard negatives ----

HARD_NEGATIVES = "hard_negatives.safetensors"
_SHARE = 0.95  # of a pair's own similarity: what is nearer is rather a caption that fits as well
_CANDIDATES = 8  # for each negative wanted: some are taken by then


class HardNegativeSampler(Sampler[tuple[int, int]]):
    """Batches of pairs that are hard to tell apart, each grown from a pair by its nearest that are left in the epoch.

    Every row comes once an epoch. The order follows from seed, epoch and the embeddings as the epoch begins; a
    checkpoint within the epoch takes it along.

    Args:
        embed: from nothing to image and text embeddings of all rows, [N, D] each, L2-normalised, equal on all ranks.
        positives: of each row a number; rows of equal number are no negatives of each other.
        negatives: that a pair is to meet of its hardest; its next ones pull less and less.
        batch_size: of all ranks together.
        seed: of all draws.
        epoch: the number of the coming epoch.
    """

    def __init__(
        self,
        embed: Callable[[], tuple[Tensor, Tensor]],
        positives: Sequence[int],
        negatives: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.embed, self.positives, self.negatives, self.batch_size = embed, list(positives), negatives, batch_size
        self.seed, self.epoch = seed, epoch
        self._mined: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.positives)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        if self._mined[0] != epoch:
            self._mined = (epoch, self._mine(epoch))
        return ((epoch, index) for index in self._mined[1])

    def _mine(self, epoch: int) -> list[int]:
        images, texts = self.embed()
        positives = torch.tensor(self.positives, device=images.device)
        candidates = hardest(images, texts, positives, _CANDIDATES * self.negatives)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, "hard negatives"))
        starts = torch.randperm(len(self), generator=generator).tolist()
        rows = _grow(
            _ties(candidates.cpu(), self.negatives), _Clashes(images, texts, positives), starts, self.batch_size
        )
        whole = len(rows) // self.batch_size
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        order = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]
        return [row for number in order for row in batches[number]]

    def save(self, folder: Path) -> None:
        """What a resume within the epoch needs: the embeddings as it began are gone by then."""
        epoch, rows = self._mined
        save_file({"epoch": torch.tensor([epoch]), "rows": torch.tensor(rows)}, folder / HARD_NEGATIVES)

    def load(self, folder: Path) -> None:
        """Take up :meth:`save`.

        Raises:
            ValueError: nothing is there, or not of these rows.
        """
        path = folder / HARD_NEGATIVES
        if not path.is_file():
            raise ValueError(
                f"hard_negatives: expected {HARD_NEGATIVES} in {folder}, which a run with them leaves there"
            )
        stored = load_file(path)
        if sorted(stored["rows"].tolist()) != list(range(len(self))):
            raise ValueError(f"{path}: expected an order of the {len(self)} rows that train here")
        self._mined = (int(stored["epoch"]), stored["rows"].tolist())


def hardest(images: Tensor, texts: Tensor, positives: Tensor, count: int, chunk: int = 1024) -> Tensor:
    """Of each pair the rows that are hardest to tell from it, [N, count], hardest first, then -1.

    How hard: the larger similarity of one's picture to the other's text. Left out: rows of the same number in
    ``positives`` [N], and those nearer than 95 % of the pair's own similarity (NV-Retriever, arXiv:2407.15831,
    TopK-PercPos). Takes N² D operations, ``chunk`` rows at once.
    """
    limit = _limits(images, texts)
    parts = []
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        score = torch.maximum(images[rows] @ texts.T, texts[rows] @ images.T)
        left_out = (score > limit[rows, None]) | (positives[rows, None] == positives)
        value, index = score.masked_fill_(left_out, -torch.inf).topk(min(count, len(images)))
        parts.append(index.masked_fill(value.isneginf(), -1))
    return torch.cat(parts)


def _limits(images: Tensor, texts: Tensor) -> Tensor:
    own = (images * texts).sum(1)
    return own - (1.0 - _SHARE) * own.abs()


def _ties(candidates: Tensor, negatives: int) -> csr_array:
    """[N, N]: how strongly rows belong into one batch, by the rank that either has among the other's hardest."""
    rows, ranks = (candidates >= 0).nonzero(as_tuple=True)
    weights = 1.0 / (1.0 + ranks.double() / negatives)
    shape = (len(candidates), len(candidates))
    ties = coo_array((weights.numpy(), (rows.numpy(), candidates[rows, ranks].numpy())), shape=shape)
    return csr_array(ties + ties.T)


class _Clashes:
    """Which rows are not to be made negatives of each other: what :func:`hardest` leaves out, of either."""

    def __init__(self, images: Tensor, texts: Tensor, positives: Tensor) -> None:
        parts = (images, texts, _limits(images, texts), positives)
        self.images, self.texts, self.limits, self.positives = (part.cpu().numpy() for part in parts)

    def any(self, row: int, others: list[int]) -> bool:
        """Of ``row`` with any of the others."""
        near = np.maximum(self.images[others] @ self.texts[row], self.texts[others] @ self.images[row])
        clash = (near > self.limits[row]) | (near > self.limits[others])
        return bool((clash | (self.positives[others] == self.positives[row])).any())


def _grow(ties: csr_array, clashes: _Clashes, starts: list[int], size: int) -> list[int]:
    """An order of all rows: neighbourhoods, from each start the row with the strongest ties to those taken, until the
    batch is full or no row is left that fits.
    """
    left, waiting = [True] * len(starts), iter(starts)
    order: list[int] = []
    own: list[int] = []
    strength: dict[int, float] = {}
    heap: list[tuple[float, int]] = []
    while len(order) < len(starts):
        if len(order) % size == 0:
            heap = []
        row = _next_fitting(heap, strength, left, clashes, own)
        if row is None:
            row = next(start for start in waiting if left[start])
            own, strength, heap = [], {}, []
        own.append(row)
        order.append(row)
        left[row] = False
        near = slice(ties.indptr[row], ties.indptr[row + 1])
        for other, tie in zip(ties.indices[near].tolist(), ties.data[near].tolist(), strict=True):
            if left[other]:
                strength[other] = strength.get(other, 0.0) + tie
                heapq.heappush(heap, (-strength[other], other))
    return order


def _next_fitting(
    heap: list[tuple[float, int]], strength: dict[int, float], left: list[bool], clashes: _Clashes, own: list[int]
) -> int | None:
    """The row with the strongest ties; one that clashes is out for this neighbourhood."""
    while heap:
        found, row = heapq.heappop(heap)
        if not left[row] or strength[row] != -found:  # taken, or here with more by now
            continue
        if not clashes.any(row, own):
            return row
        strength[row] = -np.inf
    return None


def positives_of_each_other(captions: Sequence[Sequence[str]], labels: Sequence[int] | None = None) -> list[int]:
    """A number for each row; equal where rows share a caption or a label, directly or through others."""
    marks = [[*own, *([] if labels is None else [labels[row]])] for row, own in enumerate(captions)]
    place = {mark: number for number, mark in enumerate(dict.fromkeys(mark for own in marks for mark in own))}
    links = [(row, len(marks) + place[mark]) for row, own in enumerate(marks) for mark in own]
    size = len(marks) + len(place)
    rows, columns = zip(*links, strict=True)
    graph = coo_array(([1] * len(links), (rows, columns)), shape=(size, size))
    return list(connected_components(graph, directed=False)[1][: len(marks)].tolist())
