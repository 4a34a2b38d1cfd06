"""``clipft.export_onnx``: two encoders as ONNX files, and proof that they compute what the model computes.

Everything is staged, loaded again by ``clipft.OnnxCLIP`` as a user would, compared with torch on pictures and captions,
and only then moved into place.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPProcessor

from clipft import __version__
from clipft.data.captions import shortened
from clipft.data.collate import most_tokens, tokenize
from clipft.data.pictures import check_preprocessing
from clipft.data.rows import index_texts
from clipft.deploy.quantize import pictures_and_captions, plain_model, quantize
from clipft.evaluation.metrics import retrieval_metrics
from clipft.families.family import Family
from clipft.families.registry import base_model, family_of, model_names
from clipft.files import expanded, replace_set, set_of, write_json
from clipft.inference.classifier import ZERO_SHOT
from clipft.inference.classify import classifiers_of, usual_templates, zero_shot_classifier
from clipft.inference.encode import embed_images, embed_texts, unified
from clipft.inference.onnx_clip import INFO, OnnxCLIP, tokenizer_of
from clipft.inference.stored_classifiers import write_classifiers
from clipft.models.calibrated import model_calibrations
from clipft.models.formats import MODEL_MANIFEST, ONNX_MODELS
from clipft.models.given import given_model
from clipft.models.heads import LABEL, heads_of
from clipft.models.int8 import QuantizedModel
from clipft.models.run_folder import classes_of_run
from clipft.ops.nn import QuantizedLinear

__all__ = ["export_onnx"]

OPSET = 20
TOKENIZER = "tokenizer.json"
_ONE_FILE = 1536 << 20  # bytes of weights from which torch writes them apart whatever it is told
_PAIRS = 500  # of the data, that the report looks at
_RUNS = 10  # for a latency
_ODD = ("  Two  Spaces, CAPITALS & 'signs'!", "caf\u00e9 na\u00efve \u4e00\u5f20\u7167\u7247", "long " * 600)
_MODEL_FILES = ("image_encoder", "text_encoder")


def export_onnx(
    model: Any,
    processor: CLIPProcessor | None = None,
    directory: str | Path | None = None,
    *,
    int8: bool = False,
    data: Any = None,
    min_cosine: float = 0.99,
    skip: Sequence[str] = (),
    external_data_above: int = _ONE_FILE,
) -> dict[str, Any]:
    """Write a model as ONNX, and report how near it is to the model in torch.

    The folder gets ``image_encoder.onnx`` (``pixel_values`` [N, 3, H, W] -> ``image_embeds`` [N, D]) and
    ``text_encoder.onnx`` (``input_ids``, ``attention_mask`` [N, L] -> ``text_embeds`` [N, D]), with dynamic N and L,
    L2-normalised embeddings, opset 20 and no operators but ONNX's own; the processor's files; and
    ``clipft_onnx.json``. Of a model with heads the image encoder also gives ``logits`` [N, C], those of an attribute's
    head as ``logits_NAME``; ``class_vectors.npy`` has the heads' weights and, of a model that was loaded from a run's
    folder, vectors of the classes that it was scored against. :class:`clipft.OnnxCLIP` needs no more than the folder. A
    SigLIP reads captions padded to their full length: its text encoder takes ``input_ids`` of this L alone.

    Args:
        model: what :func:`clipft.load` takes, ``(model, processor)``, a :class:`clipft.recipes.run.Run`, or a float
            model, fused or not, or a peft model of one, whose adapters are merged in. Not changed.
        processor: of a model that comes without its own.
        directory: may exist; an earlier export is replaced, int8 encoders included, other files stay.
        int8: write ``image_encoder.int8.onnx`` and ``text_encoder.int8.onnx`` too: :func:`clipft.quantize`'s linear
            layers in ONNX's integer operators, with the same weights.
        data: a data set with captions or classes to compare on, of which at most 500 rows are taken; default: 300 of
            the embedded drawings.
        min_cosine: the least mean cosine between embeddings of an encoder and of the float model in torch.
        skip: layers to leave in float with ``int8``, as in :func:`clipft.quantize`.
        external_data_above: bytes of an encoder, beyond which its weights are in a second file, ``NAME.onnx.data``,
            that the first one names: ONNX has no files over 2 GB, and above the default there is no other way.

    Returns:
        The parity report, which is also in ``clipft_onnx.json`` under ``parity``: ``data``, ``torch`` (its
        ``retrieval``, as of :func:`clipft.evaluate_retrieval`) and, for ``fp32`` and ``int8``, ``image_cosine`` and
        ``text_cosine`` (``mean``, ``min``), ``top1_agreement`` (share of the pictures with the same best caption),
        ``same_class`` (by head, and of the run's classes as ``zero_shot``, share with the same class), ``retrieval``,
        ``bytes``, and ``latency_ms`` (median of one picture and of one caption).

    Raises:
        ImportError: the ``onnx`` extra is not installed.
        ValueError: a cosine below ``min_cosine``, or preprocessing that :class:`clipft.OnnxCLIP` does not know.
            Nothing is left in ``directory`` then.
    """
    _check(min_cosine)
    if directory is None:
        raise TypeError("directory: expected a folder to write into, by this name: directory=...")
    model, processor = given_model(model, processor)
    plain = plain_model(model, False, "onnx").float()  # the encoders take and give float32
    if processor is None:
        raise ValueError("processor: expected the model's processor, as clipft.load gives both, got None")
    if int8 and not family_of(plain).int8:
        raise ValueError(f"int8: expected {model_names('int8')}, got a {type(plain).__name__}")
    pictures, captions, described = pictures_and_captions(data, _PAIRS)
    with _staged(expanded(directory)) as (folder, staging):
        info = _info(plain, processor) | _write_classifiers(model, plain, processor, staging)
        _write_processor(plain, processor, staging, info, [text for own in captions for text in own])
        _write_model(plain, processor, staging, info, skip if int8 else None, external_data_above)
        parity = {"data": described} | _compare(plain, processor, staging, (pictures, captions), int8)
        _check_parity(parity, min_cosine, folder)
        _write_info(staging, info | {"parity": parity})
    return parity


@contextmanager
def _staged(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The folder, and one beside it whose files move there when nothing has gone wrong."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"directory: expected a folder, {folder} is a file")
    keep = set_of(folder, MODEL_MANIFEST) or ()  # of a model in the same folder
    with replace_set(folder, INFO, obsolete=ONNX_MODELS, keep=keep) as staging:
        yield folder, staging


def _write_processor(model: Any, processor: Any, folder: Path, info: dict[str, Any], texts: list[str]) -> None:
    """With a tokenizer.json that alone makes the tokens that the processor does, of these texts and of odd ones."""
    processor.save_pretrained(folder)
    if not (folder / TOKENIZER).exists():  # sentencepiece writes its own file
        family_of(model).fast_tokenizer(processor.tokenizer).save(str(folder / TOKENIZER))
    alone = tokenizer_of(folder, info)
    for text in [*dict.fromkeys(texts), *_ODD]:
        want = tokenize(processor, [text], family=family_of(model))["input_ids"][0].tolist()
        if want != (got := alone.encode(shortened([text])[0]).ids):
            raise ValueError(f"processor: {TOKENIZER} makes other tokens of {text!r:.80}: {got} in place of {want}")


def _write_classifiers(model: Any, plain: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """The heads, and the classes of the run that the model was loaded from; returns their part of the description."""
    found = dict(classifiers_of(plain))
    run = str(getattr(base_model(model), "name_or_path", ""))
    templates = usual_templates(plain, run) if run else []
    if run and ZERO_SHOT not in found and (classes := classes_of_run(run)):
        found[ZERO_SHOT] = zero_shot_classifier(plain, processor, classes, templates)
    stored = {"classifiers": write_classifiers(found, folder), "templates": templates}
    return {name: value for name, value in stored.items() if value}


def _write_model(
    model: Any,
    processor: Any,
    folder: Path,
    info: dict[str, Any],
    skip: Sequence[str] | None,
    external_data_above: int,
) -> None:
    """Encoders and description; with ``skip`` the int8 encoders too."""
    _write_encoders(model, folder, "", info)
    if skip is not None:
        quantized = quantize(model, skip=skip, processor=processor)
        _write_encoders(quantized, folder, ".int8", info)
    _set_apart(folder, external_data_above)
    _write_info(folder, info)


def _check(min_cosine: float) -> None:
    """What can be told before the work."""
    _require_onnx()
    if not -1.0 <= min_cosine <= 1.0:
        raise ValueError(f"min_cosine: expected a cosine in [-1, 1], got {min_cosine}")


def _require_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the ONNX export needs {name}: pip install 'clipft[onnx]'")


# ---- the encoders ----


class _ImageEncoder(nn.Module):
    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        features: Any = self.model.get_image_features(pixel_values=pixel_values, **self.options)
        embeds = nn.functional.normalize(features.pooler_output, dim=-1)
        return embeds, *(nn.functional.linear(embeds, head.weight) for head in heads_of(self.model).values())


class _TextEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features: Any = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return nn.functional.normalize(features.pooler_output, dim=-1)


def _write_encoders(model: Any, folder: Path, kind: str, info: dict[str, Any]) -> None:
    family = family_of(model)
    if not isinstance(model, QuantizedModel):  # which has layers of its own
        family.fuse_layers(model)
    options = {"class_token_only": True} if family.vision.pools_first else {}
    config: Any = model.config
    batch = torch.export.Dim("batch")
    _write(
        _ImageEncoder(model, options),
        {"pixel_values": torch.zeros(2, *family.picture(config))},
        {"pixel_values": {0: batch}},
        ["image_embeds", *("logits" if name == LABEL else f"logits_{name}" for name in heads_of(model))],
        folder / f"image_encoder{kind}.onnx",
        info,
    )
    if "text_length" in info:  # padded to it, and without a mask
        names, axes, shape = ["input_ids"], {0: batch}, (2, info["text_length"])
    else:
        most = family.most_positions(config)
        names, shape = ["input_ids", "attention_mask"], (2, min(7, most))
        axes = {0: batch, 1: torch.export.Dim("length", min=2, max=most)}
    _write(
        _TextEncoder(model),
        {name: torch.ones(shape, dtype=torch.int64) for name in names},  # not one for both
        dict.fromkeys(names, axes),
        ["text_embeds"],
        folder / f"text_encoder{kind}.onnx",
        info,
    )


def _write(
    encoder: nn.Module,
    inputs: dict[str, Tensor],
    shapes: dict[str, Any],
    outputs: list[str],
    path: Path,
    info: dict[str, Any],
) -> None:
    from clipft.deploy.onnx_int8 import TRANSLATIONS

    with torch.no_grad(), warnings.catch_warnings(), ExitStack() as plainly:
        for layer in encoder.modules():
            if isinstance(layer, QuantizedLinear):
                plainly.enter_context(layer.plain())
        warnings.filterwarnings("ignore", "# The axis name")  # torch's, of two inputs with the same axes
        program = torch.onnx.export(
            encoder.eval(),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            custom_translation_table=cast(Any, TRANSLATIONS),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None  # only the older exporter returns nothing
    for node in program.model.graph:  # torch's notes: the lines of code that a node came from, on this machine
        node.metadata_props.clear()
    program.model.metadata_props.update({f"clipft.{name}": json.dumps(value) for name, value in info.items()})
    program.save(str(path), external_data=False)  # of 1.5 GB and more torch sets the weights apart by itself


def _set_apart(folder: Path, most: int) -> None:
    """Weights of encoders of more bytes than that, in a file beside each."""
    import onnx

    for path in sorted(folder.glob("*.onnx")):
        if path.stat().st_size > most:
            own = onnx.load(path)
            onnx.save_model(own, path, save_as_external_data=True, location=f"{path.name}.data")


# ---- what stands beside them ----


def _info(model: Any, processor: Any) -> dict[str, Any]:
    preprocessing = json.loads(json.dumps(processor.image_processor.to_dict(), default=dict))
    check_preprocessing(preprocessing, "processor")
    family, known = family_of(model), model_calibrations(model)
    return {
        "clipft": __version__,
        "model": str(model.name_or_path),
        "opset": OPSET,
        "dim": family.dim(model.config),
        "logit_scale": float(model.logit_scale.detach().exp()),
        "preprocessing": preprocessing,
        "tokenizer": TOKENIZER,
        **_padding(model, processor, family),
        **({"calibration": {name: own.to_json() for name, own in known.items()}} if known else {}),
    }


def _padding(model: Any, processor: Any, family: Family) -> dict[str, Any]:
    """Of captions, where it is not to the longest, as CLIP's."""
    if family.padding == "longest":
        return {}
    length = most_tokens(processor, family.most_positions(model.config), family=family)
    return {"padding": family.padding, "text_length": length}


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    write_json(folder / INFO, info)


# ---- the parity report ----


def _compare(
    model: Any, processor: Any, folder: Path, pairs: tuple[list[Any], list[list[str]]], int8: bool
) -> dict[str, Any]:
    pictures, captions = pairs
    texts_of, texts = index_texts(unified(model, processor, captions))
    image = embed_images(model, processor, cast(Any, [{"image": picture} for picture in pictures]), batch_size=32)
    text = embed_texts(model, processor, texts, 64)
    report: dict[str, Any] = {"torch": {"retrieval": retrieval_metrics(image, text, texts_of)}}
    for kind in ("fp32", *(["int8"] if int8 else [])):
        clip = OnnxCLIP(folder, int8=kind == "int8", threads=torch.get_num_threads())
        own_image = torch.from_numpy(clip.encode_images(pictures))
        own_text = torch.from_numpy(clip.encode_texts(texts))
        report[kind] = {
            "image_cosine": _cosines(image, own_image),
            "text_cosine": _cosines(text, own_text),
            "top1_agreement": _agreement(image @ text.t(), own_image @ own_text.t()),
            "same_class": {
                name: _agreement(own.logits(image.numpy()), own.logits(own_image.numpy()))
                for name, own in clip.classifiers.items()
            },
            "retrieval": retrieval_metrics(own_image, own_text, texts_of),
            "bytes": {name: _bytes(folder, f"{name}{_suffix(kind)}.onnx") for name in _MODEL_FILES},
            "latency_ms": _latencies(clip, pictures[0], texts[0]),
        }
    return report


def _agreement(want: Any, got: Any) -> float:
    """Share of the rows of scores [N, C] with the same best class."""
    return float(np.mean(np.asarray(want).argmax(1) == np.asarray(got).argmax(1)))


def _bytes(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{name}*"))


def _suffix(kind: str) -> str:
    return ".int8" if kind == "int8" else ""


def _cosines(want: Tensor, got: Tensor) -> dict[str, float]:
    cosines = nn.functional.cosine_similarity(want.double(), got.double())
    return {"mean": float(cosines.mean()), "min": float(cosines.min())}


def _latencies(clip: Any, picture: Any, text: str) -> dict[str, float]:
    pixels: NDArray[np.float32] = clip.preprocess(picture)[None]
    tokens = clip.tokenize([text])
    return {
        "image": _milliseconds(lambda: clip.run_images(pixels)),
        "text": _milliseconds(lambda: clip.run_texts(**tokens)),
    }


def _milliseconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _check_parity(parity: dict[str, Any], min_cosine: float, folder: Path) -> None:
    for kind in ("fp32", "int8"):
        for part in ("image", "text"):
            mean = parity.get(kind, {}).get(f"{part}_cosine", {}).get("mean", 1.0)
            if not mean >= min_cosine:
                raise ValueError(
                    f"min_cosine: expected a mean cosine of at least {min_cosine} to the model in torch, the {kind} "
                    f"{part} encoder has {mean:.5f}; nothing is written to {folder}. Leave layers in float with skip, "
                    "or lower it"
                )
