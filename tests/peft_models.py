"""The tiny CLIP with peft's adapters, plain and fused, and how near their numbers must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_clip import LENGTH, SIZE, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import CLIPModel

import clipft

peft = pytest.importorskip("peft")
lora = peft.tuners.lora

ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LAYERS = 2 * 3 * len(ALL)  # of the tiny model's two towers


def tiny_batch() -> dict[str, Tensor]:
    captions = [f"picture number {index} {'of many' * (index % 3)}" for index in range(6)]
    tokens = tiny_tokenizer()(captions, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the fused layers that run from now on."""
    from clipft.models import lora_layers

    seen: list[Tensor] = []

    def counted(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(x)
            return op(x, *args, **kwargs)

        return run

    for name in ("lora_linear", "quick_gelu_lora_linear"):
        monkeypatch.setattr(lora_layers, name, counted(getattr(lora_layers, name)))
    return seen


def config(**options: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ALL} | options))


def randomised(model: Any, seed: int = 0) -> Any:
    """B is zero at first: give every adapter weight a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: CLIPModel | None = None, **options: Any) -> Any:
    return randomised(peft.get_peft_model(model or tiny_model(), config(**options)).eval())


def both(**options: Any) -> tuple[Any, Any]:
    """The same model by peft and fused."""
    plain = adapted(**options)
    return plain, clipft.fuse(copy.deepcopy(plain))


def embeds(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return torch.cat([output.image_embeds, output.text_embeds])


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_loss=True).loss


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """Sums of a few hundred float32 terms in another order, through three layers: some hundred roundings of the
    largest.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.double().abs().max().item() + floor


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Where terms cancel (the bias of k_proj, which softmax does not see), the error is in roundings of the terms, so
    of the largest gradients.
    """
    assert got.keys() == expected.keys()
    floor = 8 * torch.finfo(torch.float32).eps * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        try:
            assert_near(got[name], value, 1e-4, floor)
        except AssertionError as error:
            raise AssertionError(name) from error


def fused_layers(model: Any) -> int:
    return sum(isinstance(m, lora.Linear) and type(m) is not lora.Linear for m in model.modules())
