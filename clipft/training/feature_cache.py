"""What a frozen tower says of a data set, computed once and found again by content.

A tower without trainable parameters gives the same output for a picture or a caption in every epoch. Its output before
the projection (``pooler_output``), which is small, stands in for pixels or tokens from then on. On disk a file belongs
to one tower (its weights and how inputs are prepared for it); a row in it, to the bytes of one picture or the tokens
of one caption. So other splits, further epochs and later runs find what is there, and any change of model,
preprocessing or data misses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipft.data.collate import tokenize
from clipft.data.digests import DIGEST, digest_of, picture_digests
from clipft.data.rows import PairRows
from clipft.data.transforms import build_transform, stack_pictures
from clipft.families.family import TowerName
from clipft.families.registry import base_model, family_of
from clipft.files import writing
from clipft.inference.encode import Progress, evaluating

__all__ = ["FrozenTowers", "frozen_towers"]


def frozen_towers(model: Any) -> frozenset[str]:
    """Which of "vision" and "text" give the same output for the same input throughout a training run.

    A SigLIP tower whose head trains does not: what goes into the head is all tokens, too much to keep.
    """
    clip = base_model(model)
    return frozenset(name for name, tower in family_of(clip).towers.items() if tower.is_frozen(clip))


class FrozenTowers:
    """Computes and keeps the features of a model's frozen towers.

    Args:
        model: a ``CLIPModel`` or one of another family, or a peft model of one.
        processor: its processor.
        folder: for the files; made when needed.
        batch_size: pictures or captions a forward pass.
        num_workers: processes that load pictures.
        precision: a context for the forward passes, such as autocast, and its name.
        max_length: most tokens of a caption.
        progress: wraps the loops, for instance ``tqdm.tqdm``.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        folder: str | Path,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        precision: tuple[str, Callable[[], AbstractContextManager[Any]]] = ("", nullcontext),
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.clip, self.family = base_model(model), family_of(model)
        self.processor, self.folder = processor, Path(folder)
        self.batch_size, self.num_workers, self.max_length = batch_size, num_workers, max_length
        self.precision, self.progress = precision, progress or (lambda loop: loop)

    def images(self, rows: PairRows) -> Tensor:
        """[N, D] float32 on the CPU, in the order of the rows."""
        pictures = _Pictures(rows, build_transform(self.processor.image_processor))
        digests = picture_digests(rows.dataset)

        def compute(missing: list[int]) -> Iterable[Tensor]:
            subset = torch.utils.data.Subset(pictures, missing)
            stack = partial(stack_pictures, self.processor.image_processor)
            loader: Any = DataLoader(subset, self.batch_size, num_workers=self.num_workers, collate_fn=stack)
            return (self._forward("vision", **inputs) for inputs in loader)

        return self._features("vision", repr(self.processor.image_processor), digests, compute)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """[M, D] float32 on the CPU, in the order of the captions."""
        tokens = [self._tokens([caption])["input_ids"][0] for caption in captions]
        digests = [digest_of(ids.numpy().tobytes()) for ids in tokens]

        def compute(missing: list[int]) -> Iterable[Tensor]:
            for start in range(0, len(missing), self.batch_size):
                batch = [captions[index] for index in missing[start : start + self.batch_size]]
                yield self._forward("text", **self._tokens(batch))

        return self._features("text", "", digests, compute)

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        return tokenize(self.processor, captions, self.max_length, family=self.family)

    def _forward(self, tower: TowerName, **inputs: Tensor) -> Tensor:
        own = self.family.towers[tower]
        with evaluating(own.module_of(self.clip)) as device, self.precision[1]():
            output = own.features(self.clip, **{name: tensor.to(device) for name, tensor in inputs.items()})
        return output.float().cpu()

    def _features(
        self, tower: TowerName, preparation: str, digests: list[bytes], compute: Callable[[list[int]], Iterable[Tensor]]
    ) -> Tensor:
        path = self.folder / f"{tower}-{self._fingerprint(tower, preparation)}.safetensors"
        known, table = _read(path)
        first = {digest: index for index, digest in reversed(list(enumerate(digests))) if digest not in known}
        missing = sorted(first.values())
        if missing:
            batches = range(0, len(missing), self.batch_size)
            computed = zip(self.progress(batches), compute(missing), strict=True)
            new = torch.cat([features for _, features in computed])
            table = new if table is None else torch.cat([table, new])
            known |= {digests[index]: len(known) + place for place, index in enumerate(missing)}
            _write(path, known, table)
        assert table is not None  # a data set has rows
        return table[[known[digest] for digest in digests]]

    def _fingerprint(self, tower: TowerName, preparation: str) -> str:
        own = self.family.towers[tower]
        digest = hashlib.blake2b(
            f"{own.settings(self.clip)}/{preparation}/{self.precision[0]}".encode(), digest_size=DIGEST
        )
        for name, tensor in own.module_of(self.clip).state_dict().items():
            digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


# ---- pictures ----


class _Pictures(Dataset[Tensor]):
    """The rows' pictures, transformed."""

    def __init__(self, rows: PairRows, transform: Callable[[Any], Tensor]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.rows[index]["image"])


# ---- files ----


def _read(path: Path) -> tuple[dict[bytes, int], Tensor | None]:
    """Rows by digest. A file that is not there, or is not as :func:`_write` leaves it, is made anew."""
    try:
        tensors = load_file(path)
        digests, table = tensors["digests"], tensors["pooler_output"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return {}, None
    kinds = digests.dtype, digests.dim(), table.dtype, table.dim()
    if kinds != (torch.uint8, 2, torch.float32, 2) or digests.shape != (len(table), DIGEST):
        return {}, None
    rows = {row.tobytes(): index for index, row in enumerate(digests.numpy())}
    return (rows, table) if len(rows) == len(table) else ({}, None)


def _write(path: Path, rows: dict[bytes, int], table: Tensor) -> None:
    digests = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, DIGEST)
    with writing(path) as staged:
        save_file({"digests": digests, "pooler_output": table.contiguous()}, staged)
