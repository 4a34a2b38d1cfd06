"""``clipft.OnnxCLIP``: what :func:`clipft.export_onnx` wrote, on ONNX Runtime alone. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from clipft.data.captions import shortened
from clipft.data.pictures import check_preprocessing, open_picture, to_pixels
from clipft.files import check_set, settle
from clipft.models.formats import ONNX_INFO as INFO

__all__ = ["INFO", "OnnxCLIP"]

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("ONNX needs onnxruntime: pip install 'clipft[onnx]'") from error


_LENGTH = 77  # tokens of a caption, where the tokenizer does not say


class OnnxCLIP:
    """The two encoders of a folder that :func:`clipft.export_onnx` wrote.

    Args:
        directory: the folder.
        int8: take the int8 encoders, which are there if the export was told so.
        threads: of ONNX Runtime; default: one for each core that this process may use.
        providers: ONNX Runtime's execution providers.

    Attributes:
        logit_scale: what cosines are multiplied by before a softmax.
        info: the folder's ``clipft_onnx.json``.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or not of such an export, or of another
            one than the rest.
        ImportError: onnxruntime is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        int8: bool = False,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.directory = Path(directory).expanduser()
        settle(self.directory)
        self.info = _read_json(self.directory / INFO)
        self.logit_scale = float(self.info["logit_scale"])
        kind = ".int8" if int8 else ""
        if int8 and not (self.directory / "image_encoder.int8.onnx").is_file():
            raise FileNotFoundError(f"{self.directory}: no int8 encoders here; export with int8=True (--int8)")
        self._paths = [self.directory / f"{name}_encoder{kind}.onnx" for name in ("image", "text")]
        self._threads, self._providers = threads, tuple(providers)
        self._open()
        path = self.directory / "processor_config.json"
        self._preprocessing = _read_json(path).get("image_processor", {})
        check_preprocessing(self._preprocessing, str(path))
        self._tokenizer = _tokenizer(self.directory, self.info)
        read = (*(path.name for path in self._paths), path.name, "tokenizer.json", "tokenizer_config.json")
        check_set(self.directory, INFO, read)

    def _open(self) -> None:
        self._image, self._text = (_session(path, self._threads, self._providers) for path in self._paths)

    def __getstate__(self) -> dict[str, Any]:
        """ONNX Runtime's sessions stay behind; a process that was spawned opens its own if it needs them."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_image", "_text")}

    def __getattr__(self, name: str) -> Any:
        if name not in ("_image", "_text"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._open()
        return self.__dict__[name]

    def encode_images(
        self, images: Sequence[Any], batch_size: int = 32, progress: Callable[[range], Any] | None = None
    ) -> NDArray[np.float32]:
        """PIL pictures or paths -> [N, D] float32, L2-normalised. ``progress`` may wrap the range of batches."""
        if isinstance(images, (str, bytes)) or not hasattr(images, "__len__"):
            raise TypeError(f"images: expected a list of PIL pictures or paths, got {type(images).__name__}")
        starts = range(0, len(images), batch_size)
        parts = [
            self.run_images(
                np.stack([self.preprocess(images[i]) for i in range(start, min(start + batch_size, len(images)))])
            )
            for start in (progress(starts) if progress else starts)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.info["dim"]), np.float32)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Texts -> [N, D] float32, L2-normalised. Texts of like length share a batch."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts: expected a list of strings, got {type(texts).__name__}")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeds = np.empty((len(texts), self.info["dim"]), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            embeds[chosen] = self.run_texts(**self.tokenize([texts[index] for index in chosen]))
        return embeds

    def identity(self) -> str:
        """A digest of the encoders: other weights, another identity."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self._paths:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def preprocess(self, image: Any) -> NDArray[np.float32]:
        """A PIL picture or a path -> [3, H, W] float32, as in training to the bit."""
        return to_pixels(open_picture(image), self._preprocessing)

    def tokenize(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """``input_ids`` and ``attention_mask`` [N, longest] int64."""
        encodings = self._tokenizer.encode_batch(shortened(texts))
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }

    def run_images(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, 3, H, W] -> [N, D]: the image encoder."""
        return np.asarray(self._image.run(None, {"pixel_values": pixel_values})[0])

    def run_texts(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, L] twice -> [N, D]: the text encoder."""
        return np.asarray(self._text.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})[0])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent}: expected a folder that clipft.export_onnx wrote; {path.name} is missing"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _cores() -> int:
    """ONNX Runtime by itself counts the machine's, and binds its threads to them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session(path: Path, threads: int | None, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent}: expected a folder that clipft.export_onnx wrote; {path.name} is missing"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime has no common class of its own
        raise ValueError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error


def _tokenizer(directory: Path, info: dict[str, Any]) -> Tokenizer:
    config = _read_json(directory / "tokenizer_config.json")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected a folder that clipft.export_onnx wrote; {path.name} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path}: expected a tokenizer ({error})") from error
    pad, length = config.get("pad_token"), config.get("model_max_length", _LENGTH)
    pad = pad["content"] if isinstance(pad, dict) else pad
    identity = tokenizer.token_to_id(pad) if pad is not None else None
    if identity is None:
        raise ValueError(f"{directory / 'tokenizer_config.json'}: expected a pad_token of the tokenizer, got {pad!r}")
    length = info.get("text_length") or (int(length) if length < 1_000_000 else _LENGTH)
    tokenizer.enable_truncation(length)
    full = info.get("padding") == "max_length"  # a CLIP's export says neither
    tokenizer.enable_padding(pad_id=identity, pad_token=pad, length=length if full else None)
    return tokenizer
