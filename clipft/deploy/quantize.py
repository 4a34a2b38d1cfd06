"""``clipft.quantize``: a model with its linear layers in int8, and what that changed.

Every product of both towers, q, k and v as one, and both projections or heads become ``clipft.nn.QuantizedLinear``;
embeddings, norms and attention stay in float. The errors that the report tells are measured on pictures: the inputs of
each layer are taken from the float model, half of their rows serve the searches of ``calibrate`` and the other half
judge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

import clipft._C
from clipft.data.drawings import decode, on_white, read_pictures
from clipft.data.rows import PairRows
from clipft.families.family import Family
from clipft.families.registry import family_of, find_family, model_names
from clipft.models.fusing import unfuse
from clipft.models.given import given_model
from clipft.models.int8 import QKV, QuantizedModel, install, sources_of
from clipft.models.lora import merged_base
from clipft.models.rounding import patch_layer, quantize_layer
from clipft.ops.nn import QuantizedLinear

__all__ = ["pictures_and_captions", "plain_model", "quantize"]

_PICTURES = 32  # that the errors are measured on
_DRAWINGS = 300  # embedded ones to compare on, at most
_ROWS = 512  # of a layer's input
_TOKENS = 16  # of a random text


def quantize(
    model: Any,
    *,
    skip: str | Iterable[str] = (),
    inplace: bool = False,
    data: Any = None,
    processor: Any = None,
    calibrate: bool = False,
) -> QuantizedModel:
    """Replace the linear layers of both towers, projections and heads, and the patch convolution by int8 layers.

    Weights are rounded to int8 with one scale an output channel; activations are rounded at run time, row by row. No
    data is needed for that.

    Args:
        model: what :func:`clipft.load` takes, ``(model, processor)``, a :class:`clipft.recipes.run.Run`, or a model; of
            any family but SigLIP 2 NaFlex, fused or not, or a peft model of one, whose adapters are merged first; on
            the CPU.
        skip: layers to leave in float, by whole parts of their names: ``"visual_projection"``, ``"fc2"``,
            ``"vision_model.encoder.layers.0"``.
        inplace: take the model's own modules instead of a copy; what is left of ``model`` is the result.
        data: a data set (as from :func:`clipft.load_pairs`) to measure the errors on; default: 32 of the embedded
            pictures, with their captions where ``processor`` is given and random tokens where not.
        processor: of a model that comes without its own; needed with ``data``.
        calibrate: from the same pictures, search the range of each channel's weights (clipping) and move scale from
            inputs to weights (SmoothQuant, Xiao et al. 2023, across the norm before a layer), each kept only where it
            lowers the layer's error on rows that the search did not see.

    Returns:
        The model in evaluation mode, in use one of its own class. ``save_pretrained`` writes what :func:`clipft.load`
        reads. Its ``quantization_report`` holds ``layers`` (for each, by its name in the float model, ``error``: the
        relative error of its output, and with ``calibrate`` what was kept: ``clipped``, ``smoothing``; a pooling
        head's keys and values are one layer, ``kv_proj``), ``skipped``, ``image_cosine`` and ``text_cosine`` (``mean``
        and ``min`` over the pictures and captions, to the float model's embeddings), ``pictures`` and ``texts`` (what
        they are), and ``bytes`` (``float`` and ``int8``, of the whole model).

    Raises:
        TypeError: of no family, or not on the CPU in a float type that the kernels have.
        ValueError: a ``Siglip2Model``, which is NaFlex, ``skip`` that names nothing, ``data`` without ``processor``,
            weights with NaN or Inf.
    """
    model, processor = given_model(model, processor)
    plain = plain_model(model, inplace, "int8")
    del model  # one that was loaded here has no other owner
    family, size = family_of(plain), _bytes(plain)
    family.split_layers(plain)
    names, skipped = _layers_of(plain), [skip] if isinstance(skip, str) else list(skip)
    left_out = _matching(names, skipped)
    if data is not None and processor is None:
        raise ValueError("processor: expected the model's processor together with data, got None")
    batch, described = _measure_on(plain, family, data, processor)
    chosen = [name for name in names if name not in left_out]
    quantized, errors, before = _quantize_layers(plain, chosen, batch, calibrate)
    after = _embeddings(quantized, batch)
    quantized.quantization_report = {
        "layers": {name: errors[name] for name in names if name in errors},
        "skipped": left_out,
        **{f"{kind}_cosine": _cosines(before[kind], after[kind]) for kind in before},
        **described,
        "bytes": {"float": size, "int8": _bytes(quantized)},
    }
    clipft._C.trim_heap()  # of float weights, and of what the measured pictures took on their way
    return quantized


def _quantize_layers(
    plain: Any, names: list[str], batch: dict[str, Tensor], calibrate: bool
) -> tuple[QuantizedModel, dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The model with these layers in int8, each layer's errors, and the float model's embeddings."""
    plan = _plan(plain, names)
    rows, embeddings = _observe(plain, plan, batch)
    layers: dict[str, QuantizedLinear] = {}
    errors: dict[str, dict[str, Any]] = {}
    for name, sources in plan.items():
        layers[name], errors_of = quantize_layer(plain, name, sources, rows.pop(name), calibrate)
        errors |= errors_of
    return install(plain, layers), errors, embeddings


# ---- the float model ----


def plain_model(model: Any, inplace: bool, use: Literal["int8", "onnx"]) -> Any:
    """The float model itself or a copy, unfused, adapters merged, in evaluation mode.

    Raises:
        TypeError, ValueError: not a model of a family that has this use, or not ready for it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, QuantizedModel):
        raise ValueError("model: expected a float model, got one that has int8 layers already")
    family = find_family(type(inner))
    if family is None:
        raise TypeError(f"model: expected {model_names(use)} or a peft model of one, got {type(inner).__qualname__}")
    if not getattr(family, use):
        raise ValueError(f"model: {use} takes {model_names(use)} so far, got a {type(inner).__name__}")
    if inner.device.type != "cpu":
        raise TypeError(f"model: expected a model on the CPU, got one on {inner.device}: call model.cpu() first")
    if not inplace:
        model = copy.deepcopy(model)
    if model_has_adapters := hasattr(model, "merge_and_unload"):
        model = merged_base(model)
    plain = unfuse(model)
    if not model_has_adapters and getattr(plain, "peft_config", None):
        raise TypeError("model: expected one without injected adapters; merge them first, or give a PeftModel")
    return plain.eval()


def _layers_of(model: nn.Module) -> list[str]:
    """Names of what becomes int8, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or name.endswith("embeddings.patch_embedding")
    ]


def _matching(names: list[str], skip: list[str]) -> list[str]:
    """The layers that ``skip`` names."""
    chosen: set[str] = set()
    for entry in skip:
        found = [name for name in names if f".{entry}." in f".{name}."]
        if not found:
            last = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise ValueError(f"skip: {entry!r} matches no layer; there are {', '.join(last)}, as in {names[0]!r}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _plan(model: Any, names: list[str]) -> dict[str, list[str]]:
    """For each int8 layer the names of the layers that it stands for."""
    plan: dict[str, list[str]] = {}
    for name in names:
        together = f"{name.rpartition('.')[0]}.{QKV}"
        sources = sources_of(model, together)
        if name in sources and all(source in names for source in sources):
            plan[together] = sources
        else:
            plan[name] = [name]
    return plan


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


# ---- what it is measured on ----


def _measure_on(model: Any, family: Family, data: Any, processor: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A batch of pictures and captions, and what they are."""
    pictures, captions, source = pictures_and_captions(data, _PICTURES)
    if processor is None:
        return {"pixel_values": _pixels(model, family, pictures), **_random_tokens(model, family)}, {
            "pictures": source,
            "texts": f"{_PICTURES} of random tokens",
        }

    from clipft.data.collate import tokenize  # torchvision takes a second, and random tokens do without
    from clipft.data.transforms import build_transform

    transform = build_transform(processor.image_processor)
    pixels = torch.stack([transform(picture) for picture in pictures])
    texts = [own[0] for own in captions]
    return {"pixel_values": pixels, **tokenize(processor, texts, family=family)}, {
        "pictures": source,
        "texts": f"captions of the {source}",
    }


def pictures_and_captions(data: Any, most: int) -> tuple[list[Any], list[list[str]], str]:
    """At most so many rows of a data set, or of the embedded drawings, at equal distances, and what they are."""
    if data is None:
        drawings = _spread(read_pictures(), min(most, _DRAWINGS))
        named = [[row["name"]] for row in drawings]
        return [on_white(decode(row)) for row in drawings], named, f"{len(drawings)} embedded drawings"

    rows = PairRows(data)
    pairs = [rows[index] for index in _spread(range(len(rows)), most)]
    return [pair["image"] for pair in pairs], [pair["captions"] for pair in pairs], f"{len(pairs)} rows of the data"


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    step = len(rows) / min(len(rows), most)
    return [rows[int(number * step)] for number in range(min(len(rows), most))]


def _pixels(model: Any, family: Family, pictures: list[Any]) -> Tensor:
    """CLIP's own preprocessing at the model's size; of square drawings, so without a crop."""
    side = model.config.vision_config.image_size
    arrays = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
    raw = [array.view(picture.height, picture.width, 3) for array, picture in zip(arrays, pictures, strict=True)]
    pixels = torch.stack(raw).permute(0, 3, 1, 2).float() / 255
    pixels = nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - torch.tensor(family.pixel_mean).view(3, 1, 1)) / torch.tensor(family.pixel_std).view(3, 1, 1)


def _random_tokens(model: Any, family: Family) -> dict[str, Tensor]:
    config, most = model.config.text_config, family.most_positions(model.config)
    last = config.vocab_size - 1
    end = config.eos_token_id
    end = min(end, last) if isinstance(end, int) and end != 2 else last  # 2: old ones take the largest
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, max(end, 1), (_PICTURES, min(_TOKENS, most)), generator=generator)
    if config.eos_token_id == 2:
        ids[:, -2:-1] = 2  # XLM-R's
    ids[:, -1] = end
    if family.padding == "longest":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padding = max(0, min(family.text_length, most) - ids.shape[1])
    return {"input_ids": nn.functional.pad(ids, (0, padding), value=min(config.pad_token_id or 0, last))}


def _embeddings(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        images = model.get_image_features(pixel_values=batch["pixel_values"].to(model.dtype))
        texts = model.get_text_features(**tokens)
    return {"image": images.pooler_output, "text": texts.pooler_output}


def _cosines(before: Tensor, after: Tensor) -> dict[str, float]:
    cosines = nn.functional.cosine_similarity(before.double(), after.double())
    return {"mean": float(cosines.mean()), "min": float(cosines.min())}


def _observe(
    model: nn.Module, plan: dict[str, list[str]], batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of the inputs of each layer, [rows, in] float32, and the embeddings."""
    rows: dict[str, Tensor] = {}
    with _hooks(model, {sources[0]: name for name, sources in plan.items()}, rows.__setitem__):
        embeddings = _embeddings(model, batch)
    return rows, embeddings


@contextmanager
def _hooks(model: nn.Module, names: dict[str, str], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        x = args[0]
        if isinstance(module, nn.Conv2d):
            x = patch_layer(module).patches(x)
        flat = x.detach().reshape(-1, x.shape[-1])
        keep(name, flat[torch.linspace(0, len(flat) - 1, min(len(flat), _ROWS)).long()].float())

    handles = [
        model.get_submodule(source).register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
        for source, name in names.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
