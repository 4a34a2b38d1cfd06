"""The attention of fused models: clipft's op where it runs, the plain class's own function everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_siglip
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_clip import SIZE, check_gradients, tiny_model
from tiny_families import tiny_family
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clipft
from clipft.ops import attend

LAYERS = 3  # a tower


def clip_batch(count: int = 6) -> dict[str, Tensor]:
    """Captions of one length, which need no mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (count, 9), generator=generator)
    ids[:, -1] = tiny_model().config.text_config.eos_token_id
    return {"pixel_values": torch.randn(count, 3, SIZE, SIZE, generator=generator), "input_ids": ids}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each was causal."""
    seen: list[bool] = []

    def counted(*args: Any, causal: bool, **kwargs: Any) -> Tensor:
        seen.append(causal)
        return attend(*args, causal=causal, **kwargs)

    monkeypatch.setattr("clipft.models.fused.attend", counted)
    return seen


IDS = torch.arange(54).view(6, 9)
MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "clip": lambda: (tiny_model(), clip_batch()),
    "metaclip_2": lambda: (
        tiny_family("metaclip_2")[0],
        clip_batch() | {"input_ids": torch.arange(54).view(6, 9) % 40},
    ),
    "chinese_clip": lambda: (tiny_family("chinese_clip")[0], clip_batch() | {"input_ids": torch.arange(54).view(6, 9)}),
    "siglip": lambda: (tiny_siglip.tiny_model("siglip"), tiny_siglip.tiny_inputs("siglip")),
}
# of both towers, but an image tower's last layer computes the class token alone, and BERT's are of another kind
EXPECTED = {"clip": 2 * LAYERS - 1, "metaclip_2": 2 * LAYERS - 1, "chinese_clip": LAYERS - 1}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_transformers(kind: str, calls: list[bool]) -> None:
    plain, batch = MODELS[kind]()
    fused, exact = clipft.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    losses = {}
    for name, model in (("plain", plain), ("fused", fused), ("exact", exact)):
        wide = {key: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for key, x in batch.items()}
        losses[name] = model(**wide, return_loss=True).loss
        losses[name].backward()
    torch.testing.assert_close(losses["fused"], losses["plain"])
    check_gradients(fused, plain, exact)
    assert len(calls) == EXPECTED.get(kind, len(calls)) > 0
    assert sum(calls) == (LAYERS if kind in ("clip", "metaclip_2") else 0)  # their texts attend to what came before


def test_under_lora_and_checkpointing(calls: list[bool]) -> None:
    pytest.importorskip("peft")
    batch, results = clip_batch(), []
    for way in ("fused", "checkpoints", "unfused"):
        torch.manual_seed(0)
        model = clipft.add_lora(tiny_model(), r=4, dropout=0.0).train()
        if way == "checkpoints":
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        (clipft.unfuse(model) if way == "unfused" else model)(**batch, return_loss=True).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    fused, checkpoints, unfused = results
    assert fused.keys() == checkpoints.keys() == unfused.keys()
    for name, grad in fused.items():
        assert torch.equal(grad, checkpoints[name])
        torch.testing.assert_close(grad, unfused[name], rtol=1e-4, atol=1e-6)
    assert len(calls) == 3 * (2 * LAYERS - 1)  # of the checkpoints twice


@pytest.mark.parametrize("how", ["eager", "mask", "half", "autocast", "dropout", "torch.func"])
def test_what_the_op_does_not_cover_is_left_to_transformers(how: str, calls: list[bool]) -> None:
    plain, batch = tiny_model(), clip_batch()
    if how == "eager":
        plain.set_attn_implementation("eager")
    elif how == "mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"]).index_fill_(1, torch.tensor([8]), 0)
    elif how == "half":
        plain, batch["pixel_values"] = plain.bfloat16(), batch["pixel_values"].bfloat16()
    elif how == "dropout":
        for tower in (plain.vision_model, plain.text_model):
            for layer in tower.encoder.layers:
                layer.self_attn.dropout = 0.5
        plain.train()

    def embeddings(model: Any) -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return torch.cat([model(**batch).text_embeds, model(**batch).image_embeds]).float()

    want, fused = embeddings(plain), clipft.fuse(copy.deepcopy(plain))
    if how == "torch.func":
        weight = {"logit_scale": fused.logit_scale.detach()}
        torch.func.grad(lambda w: torch.func.functional_call(fused, w, kwargs=batch).logits_per_image.sum())(weight)
        assert not calls
        return
    got = embeddings(fused)
    if how == "mask":
        assert calls and not any(calls)  # pictures have none
    else:
        assert not calls
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-2 if how in ("half", "autocast") else 1e-5)


def test_dropout_is_for_training_alone(calls: list[bool]) -> None:
    model = clipft.fuse(tiny_model())
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    model(pixel_values=clip_batch()["pixel_values"], return_logits=False)
    assert len(calls) == LAYERS - 1


def test_attentions_that_are_asked_for_come(calls: list[bool]) -> None:
    model, batch = tiny_model(), clip_batch()
    model.set_attn_implementation("eager")
    plain = model.vision_model(batch["pixel_values"], output_attentions=True).attentions
    got = clipft.fuse(model).vision_model(batch["pixel_values"], output_attentions=True).attentions
    assert len(got) == LAYERS and not calls
    for one, other in zip(got, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_on_projections_run(calls: list[bool]) -> None:
    model, seen = clipft.fuse(tiny_model()), []
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer = model.text_model.encoder.layers[0].self_attn
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(**clip_batch(), return_loss=True)
    assert seen == ["q_proj", "k_proj", "v_proj", "out_proj"] and calls


def test_unfuse_and_classes_of_the_users_own() -> None:
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.text_model.encoder.layers[:2])
    own = type("Own", (type(first),), {})
    second.__class__ = own
    plain = type(first)
    clipft.fuse(model)
    assert type(first) is not plain and isinstance(first, plain) and type(first).__name__ == plain.__name__
    assert type(second) is own
    clipft.unfuse(model)
    assert type(first) is plain and type(second) is own


def test_heads_are_as_wide_as_the_plain_classs(calls: list[bool]) -> None:
    """Of a layer whose heads were pruned."""
    model = tiny_model()
    for layer in model.vision_model.encoder.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = attention.get_submodule(name)
            part = nn.Linear(32, attention.head_dim)
            part.load_state_dict({key: x[: attention.head_dim] for key, x in whole.state_dict().items()})
            setattr(attention, name, part)
        attention.out_proj = nn.Linear(attention.head_dim, 32)
    pixels = clip_batch()["pixel_values"]
    want = model.get_image_features(pixels).pooler_output
    clipft.fuse(model)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, want)
    assert len(calls) == LAYERS
    torch.testing.assert_close(
        model(pixel_values=pixels, return_logits=False).image_embeds, want / want.norm(dim=1)[:, None]
    )


def test_causality_is_the_plain_classs(calls: list[bool]) -> None:
    states = torch.randn(2, 9, 32)
    for given, attribute in (({}, True), ({}, False), ({"is_causal": True}, False), ({"is_causal": False}, True)):
        model = tiny_model()
        attention = model.text_model.encoder.layers[0].self_attn
        attention.is_causal = attribute
        want = attention(states, **given)[0]
        clipft.fuse(model)
        torch.testing.assert_close(attention(states, **given)[0], want)
    assert calls == [True, False, True, False]
    siglip, ids = tiny_siglip.tiny_model("siglip"), tiny_siglip.tiny_inputs("siglip")["input_ids"]
    want = siglip.text_model(input_ids=ids, is_causal=True).pooler_output
    torch.testing.assert_close(clipft.fuse(siglip).text_model(input_ids=ids, is_causal=True).pooler_output, want)


@pytest.mark.parametrize("make", [clipft.fuse, clipft.quantize])
def test_a_users_own_sdpa_and_what_it_takes_beside(
    make: Callable[[nn.Module], nn.Module], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make(tiny_model().eval()).vision_model.encoder.layers[0].self_attn
    states, seen = torch.randn(2, 9, 32), []
    with pytest.raises(ValueError, match="softcap"):
        attention(states, softcap=1.0)

    def own(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.append(query.shape)
        return value.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    attention(states)
    assert seen == [(2, 2, 9, 16)] and not calls


def test_an_int8_model_is_causal_where_the_plain_class_is() -> None:
    states = torch.randn(2, 9, 32)
    for given, attribute in (({}, True), ({}, False), ({"is_causal": True}, False), ({"is_causal": False}, True)):
        model = clipft.quantize(tiny_model().eval())
        attention = model.text_model.encoder.layers[0].self_attn
        attention.is_causal = attribute
        got = attention(states, **given)[0]
        model.set_attn_implementation("eager")  # by masks alone
        causal = given.get("is_causal", attribute)
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None] if causal else None
        torch.testing.assert_close(got, attention(states, mask)[0], rtol=1e-4, atol=1e-3)
    siglip, ids = clipft.quantize(tiny_siglip.tiny_model("siglip")), tiny_siglip.tiny_inputs("siglip")["input_ids"]
    want = siglip.text_model(input_ids=ids).pooler_output
    assert torch.equal(siglip.text_model(input_ids=ids, is_causal=True).pooler_output, want)


def test_a_plain_class_that_takes_no_mask(calls: list[bool]) -> None:
    """Chinese-CLIP's of transformers 5.4."""
    model = tiny_model()
    attention = model.vision_model.encoder.layers[0].self_attn
    plain = type(attention)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return plain.forward(self, hidden_states, **kwargs)

    attention.__class__ = type("NoMask", (plain,), {"forward": forward, "__module__": plain.__module__})
    model.set_attn_implementation("eager")
    states = torch.randn(2, 9, 32)
    want = attention(states)[0]
    clipft.fuse(model)
    torch.testing.assert_close(attention(states)[0], want)
    assert not calls


def test_unfuse_under_accelerates_hooks() -> None:
    model = clipft.fuse(tiny_model())
    attention, seen = model.vision_model.encoder.layers[0].self_attn, []

    class Hook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            seen.append(type(module).__module__)
            return args, kwargs

    add_hook_to_module(attention, Hook())
    states = torch.randn(2, 9, 32)
    want = attention(states)[0]
    clipft.unfuse(model)
    torch.testing.assert_close(attention(states)[0], want)
    assert len(seen) == 2


def test_compiled(calls: list[bool]) -> None:
    layer = clipft.fuse(tiny_model()).vision_model.encoder.layers[0].self_attn
    states = torch.randn(2, 17, 32, requires_grad=True)
    want, got = layer(states)[0], torch.compile(layer, fullgraph=True)(states)[0]
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(result.square().sum(), states)[0] for result in (want, got)]
    torch.testing.assert_close(*grads)
