"""``clipft.OnnxCLIP``: what :func:`clipft.export_onnx` wrote, on ONNX Runtime alone. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from clipft.data.captions import shortened
from clipft.data.pictures import check_preprocessing, in_order, open_picture, to_pixels
from clipft.environment import usable_cores
from clipft.errors import line_of
from clipft.files import check_file, check_set, expanded, read_json, settle
from clipft.inference.stored_classifiers import read_classifiers
from clipft.models.calibrated import calibrations_of
from clipft.models.formats import ONNX_CLASSES
from clipft.models.formats import ONNX_INFO as INFO

__all__ = ["INFO", "OnnxCLIP", "tokenizer_of"]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # looked at as it is loaded: else some builds write and send
try:
    import onnxruntime
except ImportError as error:
    raise ImportError("ONNX needs onnxruntime: pip install 'clipft[onnx]'") from error
onnxruntime.disable_telemetry_events()  # which some builds send


_LENGTH, _MOST_TOKENS = 77, 1 << 16  # of a caption: where the tokenizer does not say; beyond what any model has
_QUIET = 4  # of ONNX Runtime's levels: what goes wrong is raised


class OnnxCLIP:
    """The two encoders of a folder that :func:`clipft.export_onnx` wrote.

    Args:
        directory: the folder.
        int8: take the int8 encoders, which are there if the export was told so.
        threads: of ONNX Runtime; default: one for each core that this process may use.
        providers: ONNX Runtime's execution providers.

    Attributes:
        logit_scale: what cosines are multiplied by before a softmax.
        classifiers: by name the model's heads, and under ``zero_shot`` the classes that its run was scored against:
            ``classifiers["label"].probabilities(clip.encode_images(pictures))``.
        calibrations: by the same names, what logits are divided by then; none where the model had none.
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
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads: expected a number of at least 1, got {threads!r}")
        self.directory = expanded(directory)
        settle(self.directory)
        self.info = _description(self.directory / INFO)
        self.logit_scale = float(self.info["logit_scale"])
        self.calibrations = calibrations_of(self.info.get("calibration"), f"{self.directory / INFO}: calibration")
        kind = ".int8" if int8 else ""
        if int8 and not (self.directory / "image_encoder.int8.onnx").is_file():
            raise FileNotFoundError(f"{self.directory}: no int8 encoders here; export with int8=True (--int8)")
        self._paths = [self.directory / f"{name}_encoder{kind}.onnx" for name in ("image", "text")]
        self._threads, self._providers = threads, tuple(providers)
        weights = [path.name for own in self._paths for path in _files(own)]
        weights += [ONNX_CLASSES] if self.info.get("classifiers") else []
        path = _there(self.directory / "processor_config.json")
        self._preprocessing = read_json(path).get("image_processor", {})
        check_preprocessing(self._preprocessing, str(path))
        self._tokenizer = tokenizer_of(self.directory, self.info)
        check_set(self.directory, INFO, (*weights, path.name, "tokenizer.json", "tokenizer_config.json"))
        self._open()
        self._check_graphs()
        stored, where = self.info.get("classifiers"), str(self.directory / INFO)
        self.classifiers = read_classifiers(stored, self.directory, self.info["dim"], self.calibrations, where)

    def _open(self) -> None:
        self._image, self._text = (_session(path, self._threads, self._providers) for path in self._paths)

    def _check_graphs(self) -> None:
        """That they take what is made of a picture and of captions, whatever these hold, and give what the description
        says."""
        dim, (image, text) = self.info["dim"], self._paths
        wanted = f"embeddings of {dim} numbers, as {INFO} says"
        pixels = self.preprocess(Image.new("RGB", (3, 2)))[None]
        expected = {"pixel_values": ("tensor(float)", pixels.shape)}
        _check_inputs(image, self._image, expected, "processor_config.json")
        length, vocabulary = cast(Any, self._tokenizer.truncation)["max_length"], self._tokenizer.get_vocab()
        ids = np.full((1, length), max(vocabulary.values()), np.int64)
        names = ["input_ids", *(["attention_mask"] if self._masked() else [])]
        _check_inputs(text, self._text, dict.fromkeys(names, ("tensor(int64)", ids.shape)), "tokenizer_config.json")
        for path, (found, *_) in ((image, self._image.get_outputs()), (text, self._text.get_outputs())):
            if found.type != "tensor(float)" or found.shape[1:] not in ([dim], [str(found.shape[-1])]):
                raise ValueError(_disagrees(path, f"gives {found.type} {found.shape}", wanted))
        try:
            embeds = self.run_texts(ids, np.ones_like(ids))
        except ValueError as error:
            tokens = f"captions of {length} tokens up to {ids[0, 0]}, as tokenizer.json and tokenizer_config.json say"
            raise ValueError(_disagrees(text, "fails", f"{tokens} ({line_of(error)})")) from error
        if embeds.shape != (1, dim):
            raise ValueError(_disagrees(text, f"gives {list(embeds.shape)}", wanted))

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
        images = in_order(images)
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
        texts = in_order(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeds = np.empty((len(texts), self.info["dim"]), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            embeds[chosen] = self.run_texts(**self.tokenize([texts[index] for index in chosen]))
        return embeds

    def identity(self) -> str:
        """A digest of the encoders: other weights, another identity."""
        digest = hashlib.blake2b(digest_size=16)
        for path in (path for own in self._paths for path in _files(own)):
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
        return digest.hexdigest()

    def preprocess(self, image: Any) -> NDArray[np.float32]:
        """A PIL picture or a path -> [3, H, W] float32, as in training to the bit."""
        return to_pixels(open_picture(image), self._preprocessing)

    def tokenize(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """``input_ids`` and ``attention_mask`` [N, longest] int64; a SigLIP's [N, full length]."""
        encodings = self._tokenizer.encode_batch(shortened(texts))
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }

    def run_images(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, 3, H, W] -> [N, D]: the image encoder."""
        return _run(self._paths[0], self._image, {"pixel_values": pixel_values})

    def run_texts(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """[N, L] twice -> [N, D]: the text encoder. A SigLIP's leaves the mask out."""
        inputs = {"input_ids": input_ids}
        if self._masked():
            if attention_mask is None:
                raise ValueError("attention_mask: expected one, as tokenize gives it: this text encoder minds padding")
            inputs["attention_mask"] = attention_mask
        return _run(self._paths[1], self._text, inputs)

    def _masked(self) -> bool:
        """Captions that are padded to their full length need no mask; encoders of version 0.1 take one all the same."""
        full = self.info.get("padding") == "max_length"
        return not full or any(one.name == "attention_mask" for one in self._text.get_inputs())


# ---- the folder ----


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent}: expected a folder that clipft.export_onnx wrote; {path.name} is missing"
        )
    check_file(path)
    return path


def _files(encoder: Path) -> list[Path]:
    """An encoder's: the graph and, where they are apart, its weights. Of a stranger's, whose weights may lie in others
    of the folder, ONNX Runtime itself opens none outside it."""
    for path in encoder.parent.iterdir() if encoder.parent.is_dir() else ():
        if path.exists() and not path.is_dir():
            check_file(path)  # an encoder may name any
    return [_there(encoder), *sorted(encoder.parent.glob(f"{encoder.name}.*"))]


def _description(path: Path) -> dict[str, Any]:
    """``clipft_onnx.json``: its numbers are numbers."""
    info = read_json(_there(path))
    for name, good in (("dim", _is_count), ("logit_scale", _is_scale), ("text_length", _is_count)):
        value = info.get(name)
        if not (good(value) or (value is None and name == "text_length")):  # a CLIP's says none
            raise ValueError(f"{path}: expected {name} to be a number above 0, found {value!r:.80}: export it again")
    return info


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_TOKENS


def _disagrees(path: Path, found: str, expected: str) -> str:
    return f"{path}: {found}, expected {expected}: it is not of the same export as the files beside it; export it again"


def _check_inputs(
    path: Path, session: onnxruntime.InferenceSession, expected: dict[str, tuple[str, tuple[int, ...]]], by: str
) -> None:
    """That a graph takes these types and shapes, as the file ``by`` asks for them, of batches of any size."""
    found = {one.name: (one.type, one.shape) for one in session.get_inputs()}
    for name in found.keys() | expected.keys():
        kind, shape = found.get(name, ("", []))
        wanted, sizes = expected.get(name, ("", ()))
        fixed = [size for size, own in zip(shape[1:], sizes[1:], strict=False) if isinstance(size, int) and size != own]
        if kind != wanted or len(shape) != len(sizes) or fixed or isinstance(shape[0], int):
            takes = f"takes {name} as {kind} {shape}" if kind else f"takes no {name}"
            asked = f"{wanted} [batch, {', '.join(map(str, sizes[1:]))}], as {by} makes it"
            raise ValueError(_disagrees(path, takes, asked))


# ---- ONNX Runtime ----


def _session(path: Path, threads: int | None, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    # by itself it takes the machine's cores, and binds its threads to them
    options.intra_op_num_threads = threads or usable_cores()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # ONNX Runtime has no common class of its own
        raise ValueError(f"{path}: ONNX Runtime cannot load it: {line_of(error)}") from error


def _run(path: Path, session: onnxruntime.InferenceSession, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    try:
        return np.asarray(session.run(None, inputs)[0])
    except Exception as error:
        raise ValueError(f"{path}: ONNX Runtime cannot run it: {line_of(error)}") from error


# ---- the tokenizer ----


def tokenizer_of(directory: Path, info: dict[str, Any]) -> Tokenizer:
    """Of an export's folder, without transformers: cut and padded as its description says."""
    described, path = _there(directory / "tokenizer_config.json"), _there(directory / "tokenizer.json")
    config = read_json(described)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{path}: expected a tokenizer ({line_of(error)})") from error
    pad, length = config.get("pad_token"), config.get("model_max_length", _LENGTH)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    identity = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
    if identity is None:
        raise ValueError(f"{described}: expected a pad_token of the tokenizer, got {pad!r:.80}")
    if type(length) not in (int, float) or not length >= 1:
        raise ValueError(f"{described}: expected model_max_length to be a number of tokens, got {length!r:.80}")
    sides = {name: config.get(name, "right") for name in ("truncation_side", "padding_side")}
    for name, side in sides.items():
        if side not in ("left", "right"):
            raise ValueError(f"{described}: expected {name} to be left or right, got {side!r:.80}")
    length = info.get("text_length") or (int(length) if length <= _MOST_TOKENS else _LENGTH)
    tokenizer.enable_truncation(length, direction=sides["truncation_side"])
    tokenizer.enable_padding(
        direction=sides["padding_side"],
        pad_id=identity,
        pad_token=pad,
        length=length if info.get("padding") == "max_length" else None,  # a CLIP's export says neither
    )
    return tokenizer
