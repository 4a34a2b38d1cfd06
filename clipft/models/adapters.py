"""Folders with a LoRA adapter as peft writes them, whoever wrote this one, put into their base models.

peft is given a configuration in which nothing is left that could run or that could take for ever: its patterns are
matched here, within a time, and the names that they mean take their place.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipft.errors import line_of, listed, short
from clipft.files import expanded, read_json
from clipft.models.formats import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from clipft.models.weights import Stored, check_floats_stored, stored_in

__all__ = ["base_of", "put_adapter"]

_NEVER = {
    "megatron_config": "which imports a module of the folder's choice",
    "monteclora_config": "which draws random matrices of sizes that no weights bound",
    "alora_invocation_tokens": "whose adapters cannot be merged into their base",
}
_ITERATIONS = 64  # of the beginnings that peft computes (PiSSA, LoftQ), an adapter's weights or not
_SECONDS = 0.5  # for all patterns of a configuration; they take milliseconds
_NAME = re.compile(r"[\w.\-]*")
_PREFIX, _FIRST = "base_model.model.", re.compile(r"\.lora_(?:A\.weight|embedding_A)$")
_ODD = 16  # times the largest rank in the weights: no adapter's r


def base_of(folder: Path) -> tuple[str, str | None]:
    """The name of an adapter's base model, and its revision if it says one.

    Raises:
        FileNotFoundError: no weights. ValueError: not LoRA, or no base model is named.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    kind, base, revision = (config.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    if kind != "LORA":
        raise ValueError(f"{path}: expected peft_type 'LORA', found {short(kind)}")
    if not isinstance(base, str) or not base or not _may_be_a_name(base):
        raise ValueError(f"{path}: expected base_model_name_or_path to name the base model, found {short(base)}")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"{path}: expected revision to be a name, found {short(revision)}")
    stored_in(_weights_of(folder))
    return base, revision


def _weights_of(folder: Path) -> Path:
    names = (ADAPTER_WEIGHTS, ADAPTER_PICKLE)
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: expected the adapter's weights in {ADAPTER_WEIGHTS}, which is missing")
    return found


def _may_be_a_name(text: str) -> bool:
    """Whether a system can be asked for a file or folder of this name."""
    try:
        expanded(text).stat()
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:  # half a character, or a NUL
        return False
    return True


def put_adapter(peft: Any, model: Any, folder: Path, base: str) -> Any:
    """The base model inside a ``peft.PeftModel`` with the adapter; ``base`` is its name for messages.

    Raises:
        ValueError: the adapter does not fit, or its configuration is not one that clipft lets peft read.
    """
    path, weights = folder / ADAPTER_CONFIG, _weights_of(folder)
    found = stored_in(weights)
    check_floats_stored(weights, found)
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        _bound(config, [name for name, _ in model.named_modules() if name], path)
        _check_numbers(config, found, path)
        adapted = peft.PeftModel.from_pretrained(model, folder, config=config)
        odd = set(peft.get_peft_model_state_dict(adapted)) ^ set(found)  # of which peft only warns
        if odd:
            raise ValueError(f"missing or left over: {listed(odd)}")
    except Exception as error:  # of whatever class peft's parts raise
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"{weights}: does not fit the base model {base!r} as {path.name} puts it there: {line_of(error)}"
        ) from error
    return adapted


# ---- patterns ----


def _bound(config: Any, names: Sequence[str], path: Path) -> None:
    """Put names in place of the configuration's regular expressions."""
    end = time.monotonic() + _SECONDS
    for field, why in _NEVER.items():
        if getattr(config, field, None) is not None:
            raise ValueError(f"{path}: expected no {field}, {why}")
    loftq = config.loftq_config if isinstance(config.loftq_config, dict) else {}
    for number in (*re.findall(r"\d+", str(config.init_lora_weights)), loftq.get("loftq_iter", 1)):
        if not isinstance(number, int | str) or int(number) > _ITERATIONS:
            raise ValueError(f"{path}: expected at most {_ITERATIONS} iterations to begin with, found {number!r:.80}")
    for field in ("modules_to_save", "layers_pattern"):  # peft makes expressions of these
        value = getattr(config, field, None) or ()
        for name in [value] if isinstance(value, str) else value:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{path}: expected {field} to hold names, found {short(name)}")
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str) and value and not (field == "target_modules" and value == "all-linear"):
            setattr(config, field, set(_matches(value, names, field, path, end)))
    if config.target_modules == set():
        raise ValueError(f"{path}: target_modules matches no layer of the base model")
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, _by_name(getattr(config, field, None) or {}, names, field, path, end))


def _by_name(values: Any, names: Sequence[str], field: str, path: Path, end: float) -> dict[str, Any]:
    """Values by pattern (of a name, or of its end) as values by name."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected {field} to be an object, found a {type(values).__name__}")
    found: dict[str, Any] = {}
    for pattern, value in values.items():
        plain = _NAME.fullmatch(pattern)
        own = [pattern] if plain else _matches(rf"(?:.*\.)?(?:{pattern})", names, field, path, end)
        found |= {name: value for name in own if name not in found}
    return found


def _matches(pattern: str, names: Sequence[str], field: str, path: Path, end: float) -> list[str]:
    import regex  # transformers needs it too; re's own search cannot be stopped

    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError as error:
        raise ValueError(
            f"{path}: {field}: matching {pattern[:80]!r} takes too long; list the layers' names in its place"
        ) from error
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {field}: {pattern[:80]!r} is no regular expression ({line_of(error)})") from error


# ---- numbers ----


def _check_numbers(config: Any, found: dict[str, Stored], path: Path) -> None:
    """That ranks are those of the weights, before layers of that size are made, and scales are numbers."""
    for field, values in (("r", config.rank_pattern), ("lora_alpha", config.alpha_pattern)):
        for value in (getattr(config, field), *values.values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{path}: expected {field} to be a number above 0, found {short(value)}")
    parts = {name: _FIRST.split(name) for name in found}
    stored = {part[0]: found[name].shape for name, part in parts.items() if len(part) > 1}
    if not stored or not all(stored.values()):
        raise ValueError(
            f"{path.with_name(ADAPTER_WEIGHTS)}: expected the weights of a LoRA adapter, found {listed(found)}"
        )
    ranks: dict[str, int] = {str(name).removeprefix(_PREFIX): shape[0] for name, shape in stored.items()}
    for layer, rank in ranks.items():
        asked = (value for end, value in config.rank_pattern.items() if f".{layer}".endswith(f".{end}"))
        if (wanted := next(asked, config.r)) != rank:
            raise ValueError(f"{path}: asks for rank {wanted} at {layer:.200}, where {ADAPTER_WEIGHTS} has rank {rank}")
    if config.r > _ODD * max(ranks.values()):  # of layers that the weights do not know
        raise ValueError(f"{path}: asks for rank {config.r}, {ADAPTER_WEIGHTS} has at most rank {max(ranks.values())}")
