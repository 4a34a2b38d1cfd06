"""What the losses refuse, and that the bare ops say the same."""

from __future__ import annotations

import pytest
import torch
from loss_cases import (
    unit,
)

import clipft
import clipft.ops  # registers the fake kernels that opcheck runs

NONE = torch.empty(0, dtype=torch.int64)
BAD = {
    "rows differ": (
        (unit(4), unit(5), 1.0),
        {},
        ValueError,
        r"text_embeds must have the shape of image_embeds, \[4, 8\], got \[5, 8\]",
    ),
    "features differ": (
        (unit(4), unit(4, 9), 1.0),
        {},
        ValueError,
        r"text_embeds must have the shape of image_embeds, \[4, 8\], got \[4, 9\]",
    ),
    "one-dimensional": ((unit(4)[0], unit(4), 1.0), {}, ValueError, r"image_embeds must be \[N, D\], got shape \[8\]"),
    "three-dimensional": (
        (unit(4), unit(4)[None], 1.0),
        {},
        ValueError,
        r"text_embeds must be \[N, D\], got shape \[1, 4, 8\]",
    ),
    "integer": (
        (torch.ones(4, 8, dtype=torch.int64), unit(4), 1.0),
        {},
        TypeError,
        "image_embeds must be float32, bfloat16 or float16, got int64",
    ),
    "float64": (
        (unit(4).double(), unit(4).double(), 1.0),
        {},
        TypeError,
        "image_embeds must be float32, bfloat16 or float16, got float64",
    ),
    "dtypes differ": (
        (unit(4), unit(4).half(), 1.0),
        {},
        TypeError,
        "text_embeds must have the dtype of image_embeds, float32, got float16",
    ),
    "no pairs": (
        (unit(0), unit(0), 1.0),
        {},
        ValueError,
        r"image_embeds must hold at least one pair and one feature, got shape \[0, 8\]",
    ),
    "no features": (
        (unit(4, 0), unit(4, 0), 1.0),
        {},
        ValueError,
        r"at least one pair and one feature, got shape \[4, 0\]",
    ),
    "labels too few": (
        (unit(4), unit(4), 1.0),
        {"labels": torch.arange(3)},
        ValueError,
        r"labels must have one entry per pair, \[4\], got shape \[3\]",
    ),
    "labels float": (
        (unit(4), unit(4), 1.0),
        {"labels": torch.ones(4)},
        TypeError,
        "labels must be int64, got float32",
    ),
    "smoothing one": (
        (unit(4), unit(4), 1.0),
        {"label_smoothing": 1.0},
        ValueError,
        r"label_smoothing must be in \[0, 1\), got 1",
    ),
    "smoothing negative": (
        (unit(4), unit(4), 1.0),
        {"label_smoothing": -0.1},
        ValueError,
        r"label_smoothing must be in \[0, 1\), got -0.1",
    ),
    "smoothing nan": (
        (unit(4), unit(4), 1.0),
        {"label_smoothing": float("nan")},
        ValueError,
        r"label_smoothing must be in \[0, 1\), got nan",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_bare_op_says_the_same(name: str) -> None:
    args, kwargs, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        clipft.contrastive_loss(*args, **kwargs)
    labels = kwargs.get("labels", NONE)
    with pytest.raises(RuntimeError, match=message) as bare:
        torch.ops.clipft.contrastive_loss(*args[:2], torch.tensor(args[2]), labels, kwargs.get("label_smoothing", 0.0))
    assert str(bare.value).splitlines()[0].endswith(str(caught.value)) or str(caught.value) in str(bare.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image_embeds": [[1.0]]}, TypeError, "image_embeds must be a tensor, got list"),
        (
            {"text_embeds": unit(4).to("meta")},
            ValueError,
            "text_embeds must be on the device of the other tensors, cpu, got meta",
        ),
        ({"logit_scale": "100"}, TypeError, "logit_scale must be a float or a float tensor, got str"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be a float or a float tensor, got int64"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must have one element, got shape \[2\]"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a tensor, got list"),
        (
            {"labels": torch.arange(4).to("meta")},
            ValueError,
            "labels must be on the device of the other tensors, cpu, got meta",
        ),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a float, got str"),
    ],
)
def test_bad_arguments_of_the_function(change: dict, error: type[Exception], message: str) -> None:
    args = {"image_embeds": unit(4), "text_embeds": unit(4, seed=1), "logit_scale": 1.0} | change
    with pytest.raises(error, match=message):
        clipft.contrastive_loss(**args)


def test_sigmoid_names_its_arguments() -> None:
    with pytest.raises(TypeError, match=r"clipft.sigmoid_loss: logit_bias must be a float or a float tensor, got str"):
        clipft.sigmoid_loss(unit(4), unit(4), 1.0, "x")
    with pytest.raises(ValueError, match=r"clipft.sigmoid_loss: text_embeds must have the shape"):
        clipft.sigmoid_loss(unit(4), unit(5), 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"clipft.sigmoid_loss: logit_bias must be a float32 tensor, got int64"):
        torch.ops.clipft.sigmoid_loss(unit(4), unit(4), torch.tensor(1.0), torch.tensor(1), NONE)
