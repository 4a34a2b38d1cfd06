"""Apple's GPUs, for which there are no kernels: what is done there, on tensors that pretend to be on one."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from commands import run
from torch.overrides import TorchFunctionMode

import clipft
from clipft.cli import env
from clipft.ops import attention, quick_gelu
from clipft.ops.reference import contrastive_targets


class OnMps(torch.Tensor):
    """Says so, and lies elsewhere."""

    device = property(lambda tensor: torch.device("mps"))  # type: ignore[assignment]


class Allocated(TorchFunctionMode):
    """New tensors lie there as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == torch.device("mps") else {}))


def test_plain_torch_with_one_warning_for_all_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    plain, y, labels = torch.nn.functional.normalize(torch.randn(4, 12), dim=1), torch.randn(4, 12), torch.arange(4) % 3

    def results(x: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        other = y.as_subclass(type(x))
        return [
            clipft.contrastive_loss(x, x, 20.0),
            clipft.contrastive_loss(x, x, 20.0, labels=labels),
            clipft.sigmoid_loss(x, x, 20.0, -5.0),
            clipft.lora_linear(x, other, None, other[:2], other[:, :2], 1.0),
            quick_gelu(x),
            attention(x[None], 2, causal=True),
        ]

    with Allocated(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretended = results(plain.as_subclass(OnMps), labels.as_subclass(OnMps))
    for ours, theirs in zip(pretended, results(plain, labels), strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs)
    own = [str(warning.message) for warning in caught if "clipft" in str(warning.message)]
    assert own == [
        "clipft: the kernels do not run here: there are none for mps tensors. Plain torch computes in their place"
    ]


def test_float64_is_not_asked_of_mps() -> None:
    x, labels = torch.ones(4, 12).as_subclass(OnMps), torch.arange(4)
    assert contrastive_targets(4, labels.as_subclass(OnMps)).dtype == torch.float32
    assert contrastive_targets(4, labels).dtype == torch.float64
    with pytest.raises(NotImplementedError, match=r"for mps tensors; an int8 layer .*keep the model on the CPU"):
        clipft.quantized_linear(x, x.to(torch.int8), x[:, 0], None)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return env._one_batch("cpu")


@pytest.mark.parametrize("wrong", [None, "gradient", "error"])
def test_env_compares_a_batch_with_the_cpu(
    wrong: str | None, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU, or one that errs, plays the device."""

    def pretended(device: str) -> dict[str, Any]:
        found = {name: tensor.clone() for name, tensor in batch.items()}
        if device == "mps" and wrong == "error":
            raise TypeError("Cannot convert a MPS Tensor to float64")
        if device == "mps" and wrong is not None:
            found[wrong][0, 0] += 0.01 * found[wrong].abs().max()
        return found

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(env, "_one_batch", pretended)
    found = json.loads(run("env", "--json").stdout)["mps"]
    assert found["agrees"] is (wrong is None)
    if wrong == "error":
        assert "float64" in found["error"]
    else:
        assert found["loss"] == found["image"] == 0.0 and (found["gradient"] > 0.005) is (wrong is not None)
    assert f"agrees: {wrong is None}" in run("env").stdout


def test_env_elsewhere_does_not() -> None:
    assert "mps" not in json.loads(run("env", "--json").stdout)
