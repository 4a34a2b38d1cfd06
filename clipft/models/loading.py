"""``load``: a model and its processor from any folder or name: float, int8, or a LoRA adapter with its base.

The only module that knows every kind of folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils.hub import cached_file

from clipft.errors import line_of
from clipft.families.family import Family
from clipft.families.registry import family_of, family_of_type
from clipft.files import check_file, note_changes, read_json, settle
from clipft.models.adapters import base_of, put_adapter
from clipft.models.bases import recorded_base, recorded_sizes
from clipft.models.calibrated import calibrations_of, recorded_calibrations, set_calibrations
from clipft.models.configurations import check_sizes, check_trust
from clipft.models.convert import reasons, to_hf
from clipft.models.formats import (
    ADAPTER_CONFIG,
    CALIBRATION_KEY,
    DEMO_MODEL,
    FLOAT_WEIGHTS,
    INT8_WEIGHTS,
    MERGED,
    MODEL_MANIFEST,
    ONNX_INFO,
    PROCESSOR_FILES,
    QUANT_METHOD,
    SENTENCE_MODULES,
    WEIGHT_FILES,
    folder_of,
    is_adapter_folder,
)
from clipft.models.heads import with_heads
from clipft.models.int8 import load_quantized
from clipft.models.lora import import_peft, merged_base
from clipft.models.open_clip_files import OpenCLIPFiles, find, is_open_clip_name
from clipft.models.open_clip_own import as_it_is
from clipft.models.open_clip_processors import processor_of
from clipft.models.processors import fit, load_processor
from clipft.models.resize import resize
from clipft.models.sentence_transformers import folder_of_clip, place_of_clip
from clipft.models.weights import check_shapes, check_whole, shards_of, stored_weights

__all__ = ["load", "load_merged", "settle_model"]

_READ = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")  # what is opened in a folder
_LINE = 1000  # characters of a message; some hold what a file holds
_logger = logging.getLogger(__name__)

# ---- loading ----


def load(name_or_path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name_or_path: a folder as ``save_pretrained`` writes it, of a float model or one of :func:`clipft.quantize`, a
            folder with a LoRA adapter as peft writes it, one of sentence-transformers with a CLIP (also in a sub-folder
            such as ``0_CLIPModel``), a name on the Hugging Face hub, or ``"demo"``: the small model inside the package.
            Of open_clip's models a folder or hub name with ``open_clip_config.json``
            (``hf-hub:`` and ``local-dir:`` before it are understood), ``"open_clip:ViT-B-32/laion2b_s34b_b79k"``,
            ``"open_clip:ViT-B-32/path/to/epoch_3.pt"``, or a file with a state dict of OpenAI's.
        kwargs: passed to the model's ``from_pretrained`` (``dtype``, ``revision``, ...). Weights are read from
            safetensors or, where there are none, from pickles that hold tensors and plain values alone
            (``pytorch_model.bin``, open_clip's checkpoints).

    Returns:
        A ``CLIPModel`` or one of another family in evaluation mode (open_clip's too, converted, or else an
        ``OpenCLIPModel`` with its own towers), with the classification heads that it was saved with
        (``clipft.models.heads``), and its processor, whose image
        processor is torchvision's: Hugging Face has two, their outputs differ by up to 0.015, and everything in clipft
        uses this one. An adapter comes as its base model with the adapter merged in; to train it on, load it into the
        base with ``peft.PeftModel.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: another kind of model.
        ImportError: an adapter without peft installed, a SigLIP's tokenizer without sentencepiece, or an architecture
            of open_clip's without that.
    """
    check_trust(kwargs)
    folder = folder_of(name_or_path)
    settle_model(folder)
    named = is_open_clip_name(str(name_or_path))
    if not folder.is_dir() and not named and _looks_like_path(str(name_or_path)):
        raise FileNotFoundError(
            f"name_or_path: expected a folder or a model name, but there is no folder {str(name_or_path)!r}"
        )
    source = str(folder if folder.is_dir() else name_or_path)
    with _named(source, kwargs):
        if is_adapter_folder(folder):
            return load_merged(folder, **kwargs)
        if files := find(source, kwargs.get("revision", "main")):
            return _load_open_clip(files, kwargs)
        if folder.is_dir():
            place = str(folder_of_clip(folder))
            _check_folder(Path(place))
        else:
            place = str(_of_sentence_transformers(source, kwargs) or source)
        model, processor = _load(place, kwargs)
    # what peft writes down for an adapter's base holds after cd
    model.name_or_path = str(folder.absolute()) if folder.is_dir() else source
    return model, processor


def _load(source: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    revision, here = kwargs.get("revision", "main"), Path(source).is_dir()
    folder = Path(source) if here else _fetched(source, revision)
    path = folder / "config.json"
    config = read_json(path)
    family = family_of_type(config.get("model_type"), str(path))
    check_trust(config, path)
    if here:
        _check_weights(folder)
    calibrations_of(config.get(CALIBRATION_KEY), f"{path}: {CALIBRATION_KEY}")
    processor = load_processor(family, source, revision, folder)
    with _named(str(folder), kwargs, str(path)):  # what is wrong with the weights says so
        model = _load_int8(family, source, folder, config, kwargs) or _load_float(family, source, folder, kwargs)
    fit(family, model, processor, folder)
    return model.eval(), processor


def _load_open_clip(files: OpenCLIPFiles, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """As Hugging Face's model and processor or, where it has no such model, open_clip's own towers."""
    with _named(str(files.weights), kwargs, files.where):
        own = reasons(files.model_cfg)
        config, state = as_it_is(files) if own else to_hf(files.model_cfg, files.state, files.where)
        family = family_of_type(config.model_type, files.name)
        processor = processor_of(files, family, family.picture(config)[-1])
        stored = {tensor.dtype for tensor in state.values()}
        given = {"dtype": stored.pop() if len(stored) == 1 else torch.float32} | kwargs
        given.pop("revision", None)
        model = family.model.from_pretrained(None, config=config, state_dict=state, **given)
    fit(family, model, processor, files.weights.parent)
    set_calibrations(model, files.calibrations)
    model.name_or_path = files.name
    return model.eval(), processor


@contextmanager
def _named(source: str, kwargs: dict[str, Any], file: str = "") -> Iterator[None]:
    """Whatever a library raises over a model's files has the model's name, or its file's, and is an error of a kind to
    expect."""
    try:
        yield
    except Exception as error:
        message = line_of(error, _LINE)
        if "trust_remote_code" in message:
            where = message.partition(": ")[0] if message.startswith(source) else source
            raise ValueError(f"{where}: asks to run code of its own folder, which clipft does not") from error
        named = isinstance(error, OSError | ValueError) and source in message and message == str(error)
        if named or isinstance(error, ImportError):
            raise
        if kwargs.keys() - {"revision"} and isinstance(error, TypeError):  # the caller's, not the folder's
            raise
        kind = type(error) if type(error) in (OSError, FileNotFoundError) else ValueError
        known = isinstance(error, OSError | ValueError)
        raise kind(f"{file or source}: {'' if known else f'{type(error).__name__}: '}{message}") from error


def _of_sentence_transformers(source: str, kwargs: dict[str, Any]) -> Path | None:
    """A CLIP on the hub that is in a sub-folder, with all its files: the folder of the cache; None for any other."""
    revision = kwargs.get("revision", "main")
    look = partial(cached_file, source, revision=revision, _raise_exceptions_for_missing_entries=False)
    look = partial(look, _raise_exceptions_for_connection_errors=False)
    if look("config.json") or not (modules := look(SENTENCE_MODULES)):
        return None
    place = place_of_clip(Path(modules))
    for name in PROCESSOR_FILES:
        look(name, subfolder=place)
    return _fetched(source, revision, place)


def _fetched(source: str, revision: str, place: str = "") -> Path:
    """A model on the hub: the folder of the cache with its configuration and its float weights, if it has any."""
    fetch = partial(cached_file, source, revision=revision, subfolder=place)
    folder = Path(str(fetch("config.json"))).parent
    for name in FLOAT_WEIGHTS:
        if fetch(name, _raise_exceptions_for_missing_entries=False):
            for shard in shards_of(folder / name) if name.endswith(".json") else ():
                fetch(shard)
            break
    return folder


def _load_float(family: Family, source: str, folder: Path, kwargs: dict[str, Any]) -> Any:
    """The model, with the classification heads that its configuration names."""
    note_changes(folder, MODEL_MANIFEST)
    where, stored, tensors = stored_weights(folder)
    if stored is None and Path(source).is_dir():  # transformers may know another way to a model of the hub
        raise FileNotFoundError(
            f"{folder / 'config.json'}: of a float model, whose {FLOAT_WEIGHTS[0]} is missing beside it"
        )
    tolerant = bool(kwargs.get("ignore_mismatched_sizes"))

    class Checked(with_heads(family.model)):  # type: ignore[misc]
        """Made on the device "meta": it is held against the weights before anything is allocated for it."""

        def __init__(self, config: Any) -> None:
            check_sizes(config, folder / "config.json", None if stored is None else len(stored))
            super().__init__(config)
            if stored is not None and not tolerant:
                check_shapes(where, self.state_dict(), stored)

    Checked.__name__ = family.model.__name__
    given: Any = {"ignore_mismatched_sizes": True, "trust_remote_code": False} | kwargs  # mismatches are told below
    place: str | None = source
    if tensors is not None:
        config, given = cast(Any, family.model).config_class.from_pretrained(folder, return_unused_kwargs=True, **given)
        place, given = None, given | {"config": config, "state_dict": tensors}
    model, found = Checked.from_pretrained(place, use_safetensors=True, output_loading_info=True, **given)
    mismatched = [] if tolerant else [key[0] for key in found["mismatched_keys"]]
    check_whole(where, {*found["missing_keys"], *mismatched}, found["unexpected_keys"], stored)
    model.__class__ = family.model
    return model


def _load_int8(family: Family, source: str, folder: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The int8 model, where the configuration says that it is one."""
    if "quantization_config" not in config:
        return None
    method = (config["quantization_config"] or {}).get("quant_method")
    if not family.int8 or method != QUANT_METHOD:
        raise ValueError(f"{folder / 'config.json'}: expected a float model or clipft's int8, found {method!r:.80}")
    other = sorted(kwargs.keys() - {"revision"})
    if other:
        raise TypeError(f"{other[0]}: not for {source!r}, an int8 model, which comes as it was saved")
    weights = Path(str(cached_file(source, INT8_WEIGHTS, revision=kwargs.get("revision", "main"))))
    return load_quantized(weights, cast(Any, family.model).config_class.from_dict(config))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _check_folder(folder: Path) -> None:
    """That the files are there, and are files."""
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(entry.name for entry in folder.glob("*"))[:8]) or "nothing"
        onnx = ": ONNX encoders, which embed, search and predict take" if (folder / ONNX_INFO).is_file() else ""
        raise FileNotFoundError(
            f"{folder}: expected a model folder as save_pretrained writes it, with config.json; found {found}{onnx}"
        )
    for path in folder.iterdir():
        if path.suffix in _READ and path.exists():
            check_file(path)


def _check_weights(folder: Path) -> None:
    """That there is one set of them; before a processor is looked for."""
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise FileNotFoundError(f"{folder}: expected the weights in {WEIGHT_FILES[0]}, which is missing")
    if parts := sorted(path.name for path in folder.glob("shard-*-model-*.safetensors")):
        raise ValueError(f"{folder}: expected one set of weights, found parts of a distributed run too: {parts[0]}")


def load_merged(folder: Path, **kwargs: Any) -> tuple[Any, Any]:
    """The base model that an adapter folder names, resized if it was when the adapter was trained, with the adapter
    merged into its weights, and the base's processor.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` or, of older versions of peft,
            ``adapter_model.bin``.
        kwargs: as of :func:`clipft.load`, for the base model. It is merged in float32 and rounded once, to ``dtype`` or
            what it is stored in.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: no weights, or no base model.
        ValueError: not LoRA, no base model named, weights that do not fit it, or a base model that has other weights
            than the one that the adapter was trained on.
    """
    peft = import_peft()
    check_trust(kwargs)
    _check_chain(folder, (), set())
    asked = kwargs.get("dtype", "auto")
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if dtype is not None:
        kwargs["dtype"] = torch.promote_types(dtype, torch.float32)
    base, model, processor = _load_base(folder, kwargs)
    _check_size(folder, model)
    note_changes(folder, MODEL_MANIFEST)
    kind = dtype or model.dtype
    with _named(str(folder), {}, str(folder / ADAPTER_CONFIG)):
        merged = merged_base(put_adapter(peft, model, folder, base)).to(kind).requires_grad_(True).eval()
    merged.name_or_path = str(folder.absolute())  # not the base's: these are other weights
    set_calibrations(merged, recorded_calibrations(folder))
    return merged, processor


def settle_model(folder: Path) -> None:
    """:func:`clipft.files.settle`, also where the folder is a part of a run's set."""
    settle(folder)
    if folder.name == MERGED:
        settle(folder.parent)


def _places(folder: Path) -> list[str]:
    """Where an adapter's base may be: beside it, as when it was trained, or else by its name."""
    name, recorded = base_of(folder)[0], recorded_base(folder)
    return recorded.places(name) if recorded else [name]


def _load_base(folder: Path, kwargs: dict[str, Any]) -> tuple[str, Any, Any]:
    """Its place, and what it loads as: the first that has the weights of when the adapter was trained."""
    revision, recorded = base_of(folder)[1], recorded_base(folder)
    source = {"revision": revision} if revision else {}
    failed: Exception | None = None
    for place in _places(folder):
        if folder_of(place) != DEMO_MODEL:
            _logger.warning("%s: an adapter of the model %r, which is loaded now", folder, place)
        try:
            model, processor = load(place, **source | kwargs)
            plain = load(place, **source)[0] if recorded and kwargs.keys() - {"revision"} else model  # as it is stored
        except OSError as error:
            failed = failed or FileNotFoundError(
                f"{folder / ADAPTER_CONFIG}: the base model {place!r} does not load: {error}"
            )
            continue
        if recorded is None or recorded.is_of(plain):
            with _named(str(folder), {}, str(folder / MODEL_MANIFEST)):
                resize(model, processor, **recorded_sizes(folder))
            return place, model, processor
        failed = ValueError(
            f"{folder / MODEL_MANIFEST}: knows the base model that the adapter was trained on; {place!r} has other "
            "weights: put those of then back, or train the adapter anew"
        )
    raise cast(Exception, failed)


def _check_size(folder: Path, model: Any) -> None:
    """Of an adapter that has no record of it: that it was trained on pictures of its base's size."""
    fixed = hasattr(model.config.vision_config, "image_size")
    takes = family_of(model).picture(model.config)[1] if fixed else None
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        images = read_json(path) if path.is_file() else {}
        images = images.get("image_processor", images)
        size = images.get("crop_size" if images.get("do_center_crop") else "size")
        side = size.get("height") if isinstance(size, dict) else None
        if None not in (takes, side) and side != takes:
            raise ValueError(
                f"{folder}: the adapter was trained on pictures of {side} pixels, and its base takes {takes}: save "
                "it with clipft, which notes what the base was resized to, or clipft.resize the base and put the "
                "adapter in with peft.PeftModel.from_pretrained"
            )


def _check_chain(folder: Path, above: tuple[Path, ...], done: set[Path]) -> None:
    """That an adapter, whose base may be one again, does not lead back to itself."""
    here = folder.resolve()
    if here in above:
        raise ValueError(f"{above[0] / ADAPTER_CONFIG}: expected a base model, found that it leads back to {here}")
    if here not in done and is_adapter_folder(here):
        done.add(here)
        for place in _places(here):
            _check_chain(folder_of(place), (*above, here), done)
