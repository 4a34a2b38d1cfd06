"""Weights in files of ``torch.save``: tensors and plain values alone, by ``torch.load`` with ``weights_only``.

That runs nothing; what it still allows is looked at here: memory that the file has no numbers for, and tensors that are
less, or more, than they say.
"""

from __future__ import annotations

import codecs
import mmap
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipft.errors import listed
from clipft.files import check_file

__all__ = ["read_pickle"]

_ALLOCATING = (  # in a pickle
    *(b"builtins\nbytearray\n", b"builtin__\nbytearray\n", b"ctorch\nTensor\n"),
    b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n",
)
_ENCODE = b"c_codecs\nencode\n"  # as the bytes of numpy's numbers are written, by latin1
_STRING = re.compile(rb"X(....)|U(.)", re.DOTALL)  # the opcodes of one
_LONG = 1000  # bytes of a string beside the numbers of numpy's
_SHARED = 2  # times the file's size: the most that tensors hold which have numbers in common, as tied tables have


class _Number:
    """Stands in for what open_clip's checkpoints have of numpy: numbers beside the weights, which nobody asks for."""

    def __init__(self, *parts: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_NUMBERS: list[Any] = [
    (_Number, name) for name in ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype")
]


def read_pickle(path: Path, same: str = "") -> dict[str, Tensor]:
    """The state dict in a file, or under ``state_dict`` in it: contiguous tensors on the CPU, none in another's memory.
    Where the file has them so, they stay in it, mapped.

    Args:
        path: the file.
        same: where else its weights are, for the message about a TorchScript archive.

    Raises:
        OSError: no such file. ValueError: it is damaged, or holds something else than whole tensors by name.
    """
    size = check_file(path)
    packed = zipfile.is_zipfile(path)
    try:
        if packed:
            _check_archive(path, same)
        _check_program(path)
        with torch.serialization.safe_globals(_NUMBERS):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # of whatever class an unpickler raises that gets nonsense
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks to run {code[1]}, which clipft does not" if code else "it is damaged, was cut, or is another's"
        raise ValueError(
            f"{path}: expected a file of torch.save with tensors and plain values alone; {what}"
        ) from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a state dict, or a checkpoint with one under state_dict")
    if odd := [name for name, tensor in state.items() if not _is_whole(tensor)]:
        raise ValueError(f"{path}: expected whole tensors in the state dict, found others: {listed(odd)}")
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if held > _SHARED * size:
        raise ValueError(f"{path}: expected tensors with numbers of their own, found {held} bytes of them in {size}")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""  # of DistributedDataParallel
    return {name.removeprefix(prefix): tensor for name, tensor in _apart(state).items()}


def _check_archive(path: Path, same: str) -> None:
    with zipfile.ZipFile(path) as archive:
        members, size = archive.infolist(), path.stat().st_size
        if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
            raise _RefusedError("expected a file of torch.save, which compresses nothing; its members are compressed")
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise _RefusedError(f"a TorchScript archive is code, and clipft runs none{same}")


def _check_program(path: Path) -> None:
    """That a pickle does not ask for memory that the file has no numbers for, which ``weights_only`` allows."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for call in _ALLOCATING:
            if data.find(call) >= 0:
                raise _RefusedError(f"expected tensors and plain values alone, found a {call.split()[-1].decode()}")
        if data.find(_ENCODE) >= 0 and (odd := _swelling(_program(path) or data[:])):
            raise _RefusedError(f"expected tensors and plain values alone, found {odd} to encode")


def _program(path: Path) -> bytes:
    """Of an archive the pickle, without the numbers."""
    if not zipfile.is_zipfile(path):
        return b""
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _swelling(program: bytes) -> str:
    """By which ``encode``, called again and again, makes much of little: codecs that are not of text, long strings."""
    for opcode in _STRING.finditer(program):
        length = int.from_bytes(opcode[1] or opcode[2], "little")
        text = program[opcode.end() : opcode.end() + min(length, _LONG)]
        try:
            if length > _LONG and len(text) == _LONG and text.decode():
                return "a long string"
            if length < _LONG and not codecs.lookup(text.decode("ascii"))._is_text_encoding:
                return f"the codec {text.decode()}"
        except (LookupError, ValueError):
            continue
    return ""


class _RefusedError(Exception):
    """What is wrong with a checkpoint, to be named."""


def _is_whole(tensor: Any) -> bool:
    """That there are as many numbers as it says; a pickle may say otherwise, or hold none."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.layout != torch.strided:
        return False
    if tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each contiguous and in memory of its own: copies of those that are not."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in taken
        taken.add(storage.data_ptr())
        own = tensor.detach()
        found[name] = own if alone and own.is_contiguous() else own.clone(memory_format=torch.contiguous_format)
    return found
