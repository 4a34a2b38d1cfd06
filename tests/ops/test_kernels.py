"""What all ops share: errors of C as Python's, and the checks that C cannot make."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import clipft
from clipft.nn import QuantizedLinear
from clipft.ops import dropout_mask, quick_gelu
from clipft.ops.kernels import call


def failing(text: str) -> Callable[[], None]:
    def op() -> None:
        raise RuntimeError(text)

    return op


@pytest.mark.parametrize("kind", [TypeError, ValueError, NotImplementedError, torch.OutOfMemoryError])
def test_an_error_is_of_the_kind_that_c_says(kind: type[Exception]) -> None:
    with pytest.raises(kind) as error:
        call(failing(f"{kind.__name__}: clipft.some_op: x must be: so"))
    assert type(error.value) is kind and str(error.value) == "clipft.some_op: x must be: so"
    with pytest.raises(kind) as error:
        call(failing(f"{kind.__name__}: clipft.some_op: x must be: so"), name="nn.Other")
    assert str(error.value) == "clipft.nn.Other: x must be: so"


@pytest.mark.parametrize("text", ["clipft.some_op: threads failed", "ValueError: of another", "KeyError: clipft.x: y"])
def test_any_other_error_stays_what_it_is(text: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call(failing(text), name="nn.Other")
    assert type(error.value) is RuntimeError and str(error.value) == text


def test_ops_without_a_layer_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"clipft.dropout_mask: rows and cols must not be negative, got -2 and 3"):
        dropout_mask(1, -2, 3, 0.1)
    with pytest.raises(torch.OutOfMemoryError, match=r"clipft.dropout_mask: a float32 result of 2\^63 elements"):
        dropout_mask(1, 2**40, 2**40, 0.1)


X, W, S, A, B = torch.ones(4, 8), torch.ones(6, 8), torch.ones(6), torch.ones(2, 8), torch.ones(6, 2)
LEVELS, LABELS = W.to(torch.int8), torch.arange(4)


def layer(**change: Tensor) -> QuantizedLinear:
    made = QuantizedLinear(8, 6)
    for name, tensor in change.items():
        setattr(made, name, tensor)
    return made


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda none: clipft.lora_linear(X, W, none, A, B, 1.0), r"lora_linear: bias must be \[out\], \[6\]"),
        (lambda none: clipft.quantized_linear(X, LEVELS, S, none), r"quantized_linear: bias must be \[out\], \[6\]"),
        (lambda none: layer(bias=none)(X), r"nn.QuantizedLinear: bias must be \[out\], \[6\]"),
        (
            lambda none: layer()(X, residual=none),
            r"nn.QuantizedLinear: residual must have the result's shape, \[4, 6\]",
        ),
        (
            lambda none: clipft.contrastive_loss(X, X, 1.0, labels=none.long()),
            r"contrastive_loss: labels must have one entry per pair, \[4\]",
        ),
    ],
)
def test_an_empty_tensor_is_not_none(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=rf"clipft.{message}, got (shape )?\[0\]"):
        function(torch.empty(0))


def test_a_module_tells_of_its_state_and_of_what_is_wrong_first() -> None:
    with pytest.raises(TypeError, match=r"clipft.nn.QuantizedLinear: weight_int8 must be int8, got float32"):
        layer(weight_int8=W)(X)
    with pytest.raises(ValueError, match=r"clipft.nn.QuantizedLinear: weight_scale must be \[out\], \[6\], got shape"):
        layer(weight_scale=S[:5])(X)
    with pytest.raises(
        TypeError, match=r"clipft.nn.QuantizedLinear: norm_weight must have the dtype of input, float32"
    ):
        layer()(X, norm=torch.nn.LayerNorm(8).half())
    with pytest.raises(ValueError, match=r"clipft.nn.QuantizedLinear: input must have the weight's 8 features last"):
        layer()(X[:, :7], norm=torch.nn.LayerNorm(8), residual=X)


def test_meta_losses_have_shapes_that_fit() -> None:
    """The fake kernels would take any."""
    for loss in (clipft.contrastive_loss, lambda *args: clipft.sigmoid_loss(*args, 0.0)):
        with pytest.raises(ValueError, match="text_embeds must have the shape of image_embeds"):
            loss(X.to("meta"), X[:3].to("meta"), 1.0)
        with pytest.raises(ValueError, match="at least one pair and one feature"):
            loss(X[:0].to("meta"), X[:0].to("meta"), 1.0)


@pytest.mark.parametrize(
    "function, kind, message",
    [
        (lambda: quick_gelu(X.long()), TypeError, "quick_gelu: input must be float32, bfloat16 or float16, got int64"),
        (
            lambda: clipft.lora_linear(X.double(), W.double(), None, A, B, 1.0),
            TypeError,
            "input must be .* got float64",
        ),
        (lambda: clipft.lora_linear(X, W, None, A, B.cfloat(), 1.0), TypeError, "lora_b must be .* got complex64"),
        (lambda: clipft.lora_linear(X, W, None, A, B, 1.0, dropout=1.0), ValueError, r"dropout must be in \[0, 1\)"),
        (lambda: clipft.quantized_linear(X.double(), LEVELS, S), TypeError, "input must be .* got float64"),
        (lambda: clipft.quantized_linear(X, W, S), TypeError, "weight_int8 must be int8, got float32"),
        (lambda: clipft.quantized_linear(X, LEVELS, S[:1]), ValueError, r"weight_scale must be \[out\], \[6\], got"),
        (lambda: clipft.quantized_linear(X, LEVELS, S, S.long()), TypeError, "bias must be .* got int64"),
        (lambda: layer()(X.double()), TypeError, "nn.QuantizedLinear: input must be .* got float64"),
        (lambda: clipft.contrastive_loss(X.double(), X.double(), 1.0), TypeError, "image_embeds .* got float64"),
        (lambda: clipft.contrastive_loss(X, X, 1.0, label_smoothing=1.0), ValueError, "label_smoothing must be in"),
        (lambda: clipft.sigmoid_loss(X[:1], X, 1.0, 0.0), ValueError, "text_embeds must have the shape of"),
        (lambda: clipft.sigmoid_loss(X, X, 1.0, 0.0, labels=LABELS[:1]), ValueError, "labels must have one entry per"),
    ],
)
def test_plain_torch_computes_nothing_that_the_kernels_would_refuse(
    function: Callable[[], Tensor], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "as the test wants it")
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind, match=message):
            function()
