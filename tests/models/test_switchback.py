"""Layers that train in int8: products and gradients against their formulas, codes that are never those of other
weights, and a float model all the while."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_families
import tiny_siglip
import torch
import torch.nn.functional as F
from ranks import run_ranks
from scripts import import_paths
from tiny_clip import LENGTH, SIZE, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import clipft
from clipft import reference
from clipft.models import switchback
from clipft.models.switchback import SwitchBackLinear, to_float_linears, to_switchback, trained_linears
from clipft.training.grad_cache import cached_backward
from clipft.training.schedules import WeightAverage

LAYERS = 36  # of the tiny model's two towers
SHAPES = [((50, 64), 48, True), ((13, 131), 40, False), ((2, 9, 33), 70, True), ((3, 4), 1, True)]
shapes = pytest.mark.parametrize(("shape", "out", "bias"), SHAPES, ids=str)


def layer_of(features: int, out: int, *, bias: bool = True, seed: int = 0) -> SwitchBackLinear:
    torch.manual_seed(seed)
    return SwitchBackLinear(features, out, bias=bias).train()


def backward(layer: nn.Module, shape: tuple[int, ...], out: int) -> tuple[Tensor, Tensor, Tensor]:
    """x with its gradient, dy and y."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).requires_grad_()
    dy = torch.randn((*shape[:-1], out), generator=g)
    y = layer(x)
    y.backward(dy)
    return x, dy, y.detach()


# ---- one layer ----


@shapes
def test_forward_and_the_inputs_gradient_are_those_of_the_emulation(
    shape: tuple[int, ...], out: int, bias: bool, int8_isa: str
) -> None:
    layer = layer_of(shape[-1], out, bias=bias)
    codes, added = clipft.ops.quantize_weight(layer.weight), layer.bias.detach() if bias else None
    x, dy, y = backward(layer, shape, out)
    assert torch.equal(y, clipft.ops.quantized_linear(x.detach(), *codes, added))
    want = reference.quantized_linear(x.detach().reshape(-1, shape[-1]), *codes, added).view_as(y)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    want = reference.int8_input_gradient(dy.reshape(-1, out), *codes)
    assert torch.equal(x.grad.reshape(want.shape), want)


@shapes
def test_gradients_of_weight_and_bias_are_those_of_the_true_input(
    shape: tuple[int, ...], out: int, bias: bool, int8_isa: str
) -> None:
    layer = layer_of(shape[-1], out, bias=bias)
    x, dy, _ = backward(layer, shape, out)
    rows, of_rows = x.detach().double().reshape(-1, shape[-1]), dy.double().reshape(-1, out)
    rounding = 2.0**-24 * (len(rows) + 4)
    error = (layer.weight.grad - of_rows.t() @ rows).abs()
    assert (error <= rounding * (of_rows.t().abs() @ rows.abs())).all()
    assert layer.weight.grad.dtype == torch.float32
    if bias:
        assert ((layer.bias.grad - of_rows.sum(0)).abs() <= rounding * of_rows.abs().sum(0)).all()


def test_in_evaluation_it_is_the_float_layer() -> None:
    layer = layer_of(64, 48)
    x, plain = torch.randn(20, 64), nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), plain(x))
    layer.eval()
    got, want = (own(x).square().sum() for own in (layer, plain))
    got.backward(), want.backward()
    assert torch.equal(got, want) and torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("needed", range(8))
def test_gradients_only_where_needed(needed: int) -> None:
    layer = layer_of(20, 12)
    x, dy, _ = backward(layer, (9, 20), 12)
    every = x.grad, layer.weight.grad, layer.bias.grad
    x.grad = layer.weight.grad = layer.bias.grad = None
    wanted = [bool(needed >> k & 1) for k in range(3)]
    for tensor, want in zip((x, layer.weight, layer.bias), wanted, strict=True):
        tensor.requires_grad_(want)
    y = layer(x)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(dy)
    for tensor, want, old in zip((x, layer.weight, layer.bias), wanted, every, strict=True):
        assert (tensor.grad is not None) == want
        assert tensor.grad is None or torch.equal(tensor.grad, old)


def test_an_expanded_gradient_and_no_rows() -> None:
    layer = layer_of(8, 5)
    for shape in ((6, 8), (2, 3, 8)):
        x = torch.randn(shape, requires_grad=True)
        layer.zero_grad()
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.detach().reshape(-1, 8).sum(0).expand(5, 8))
    layer.zero_grad()
    layer(torch.zeros(0, 8)).sum().backward()
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_what_it_does_not_do() -> None:
    layer = layer_of(8, 5)
    layer.layer_name, x = "text.fc1", torch.ones(2, 8, requires_grad=True)
    with pytest.raises(TypeError, match="SwitchBackLinear: input must be float32, got bfloat16; precision int8 is for"):
        layer(torch.ones(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="input must have the weight's 8 features last, got shape"):
        layer(torch.ones(2, 7))
    with pytest.raises(NotImplementedError, match="precision int8 is for a model on the CPU, got one on meta"):
        copy.deepcopy(layer).to("meta")(torch.ones(2, 8, device="meta"))
    with pytest.raises(TypeError, match="weight must be float32, got float64"):
        copy.deepcopy(layer).double()(torch.ones(2, 8))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        gradient.sum().backward()
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            layer.weight[2, 3] = bad
        with pytest.raises(ValueError, match=r"model: text\.fc1: .*weight must be finite, got NaN or Inf in it"):
            layer(torch.ones(2, 8))


# ---- codes, and of which weights ----


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that became codes."""
    seen: list[Tensor] = []

    def watched(weight: Tensor) -> Any:
        seen.append(weight.detach().clone())
        return clipft.ops.int8.quantize_and_pack(weight)

    monkeypatch.setattr(switchback, "quantize_and_pack", watched)
    yield seen


def of_now(layer: SwitchBackLinear) -> bool:
    x = torch.randn(7, layer.in_features)
    codes = clipft.ops.quantize_weight(layer.weight)
    return torch.equal(layer(x).detach(), clipft.ops.quantized_linear(x, *codes, layer.bias.detach()))


def in_place(layer: SwitchBackLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2.0)


def another_storage(layer: SwitchBackLinear) -> None:
    layer.weight.data = layer.weight.data * 2.0


def another_parameter(layer: SwitchBackLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2.0)


def after_evaluation(layer: SwitchBackLinear) -> None:
    layer.eval()
    layer.weight.data.mul_(2.0)
    layer.train()


def optimised(kind: Callable[..., Any], **options: Any) -> Callable[[SwitchBackLinear], None]:
    def change(layer: SwitchBackLinear) -> None:
        optimizer = kind(layer.parameters(), lr=0.1, **options)
        layer(torch.ones(2, layer.in_features)).square().sum().backward()
        optimizer.step()

    return change


CHANGES: dict[str, Callable[[SwitchBackLinear], None]] = {
    "in place": in_place,
    "another storage": another_storage,
    "another parameter": another_parameter,
    "after evaluation": after_evaluation,
    "a loaded state": lambda layer: layer.load_state_dict(layer_of(16, 12, seed=5).state_dict()) and None,
    "SGD": optimised(torch.optim.SGD),
    "AdamW": optimised(torch.optim.AdamW),
    "AdamW for each": optimised(torch.optim.AdamW, foreach=True),
    "fused AdamW": optimised(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_have_codes_of_their_own(
    change: Callable[[SwitchBackLinear], None], made: list[Tensor]
) -> None:
    layer = layer_of(16, 12)
    assert of_now(layer) and of_now(layer) and len(made) == 1
    change(layer)
    assert of_now(layer) and of_now(layer) and len(made) == 2


def test_a_parameter_at_the_address_of_another_has_its_own_codes() -> None:
    layer = layer_of(256, 120)
    layer.weight = nn.Parameter(torch.ones(120, 256))
    assert of_now(layer)
    address = layer.weight.data_ptr()
    for value in range(2, 10):
        layer.weight = nn.Parameter(torch.full((120, 256), float(value)))
        if layer.weight.data_ptr() == address:
            break
    assert of_now(layer)


def test_averaged_weights_have_codes_of_their_own() -> None:
    layer = layer_of(16, 12)
    average = WeightAverage(lambda: layer, 0.5)
    average.on_train_begin(None, SimpleNamespace(global_step=0), None)
    in_place(layer)
    trained = layer.weight.detach().clone()
    assert of_now(layer)
    with average.in_use():
        assert not torch.equal(layer.weight, trained) and of_now(layer)
    assert torch.equal(layer.weight, trained) and of_now(layer)


def test_recomputed_and_accumulated_passes_make_codes_once(made: list[Tensor]) -> None:
    layer = layer_of(16, 12)
    for reentrant in (False, True, False):
        x = torch.randn(4, 16, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    with torch.no_grad():
        layer(torch.ones(2, 16))
    assert len(made) == 1


def test_evaluation_and_copies_hold_no_codes() -> None:
    layer = layer_of(64, 48)
    layer(torch.ones(2, 64))
    held = layer._codes
    assert held is not None and held.made_of.data_ptr() == layer.weight.data_ptr()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._codes is None and of_now(other)
    assert layer.eval()._codes is None


# ---- a model ----


def tiny_batch() -> dict[str, Tensor]:
    captions = [f"picture number {index} {'of many' * (index % 3)}" for index in range(6)]
    tokens = tiny_tokenizer()(captions, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, return_loss=True).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts.values()]).double()


def model_in_int8() -> Any:
    model = clipft.fuse(tiny_model()).train()
    to_switchback(model)
    return model


def test_a_model_keeps_its_parameters_and_comes_back() -> None:
    model, plain = model_in_int8(), clipft.fuse(tiny_model()).train()
    assert sum(isinstance(module, SwitchBackLinear) for module in model.modules()) == LAYERS
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    own, theirs = model.state_dict(), plain.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    batch = tiny_batch()
    got, want = gradients(model, batch), gradients(plain, batch)
    assert got.keys() == want.keys() and not torch.equal(joined(got), joined(want))
    assert F.cosine_similarity(joined(got), joined(want), dim=0) > 0.99
    to_float_linears(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    assert torch.equal(joined(gradients(model, batch)), joined(want))


@pytest.mark.parametrize(
    ("freeze", "count"), [("none", 36), ("text", 18), ("vision:1", 24), ("text,vision:2", 12), ("towers", 0)]
)
def test_which_layers_train(freeze: str, count: int) -> None:
    linears = trained_linears(clipft.freeze(tiny_model(), freeze))
    assert len(linears) == count and all(linear.weight.requires_grad for linear in linears.values())


def test_beneath_an_adapter_none_do() -> None:
    pytest.importorskip("peft")
    assert trained_linears(clipft.add_lora(tiny_model(), r=2)) == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant: bool, made: list[Tensor]) -> None:
    batch, model = tiny_batch(), model_in_int8()
    want = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, batch)
    assert len(made) == LAYERS
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_gradient_cache_gives_that_of_the_whole_batch(made: list[Tensor]) -> None:
    batch, model = tiny_batch(), model_in_int8()
    want = gradients(model, batch)
    model.zero_grad()
    cached_backward(model, batch, 4, clipft.contrastive_loss, backward=lambda total: total.backward())
    assert len(made) == LAYERS
    for name, parameter in model.named_parameters():
        error = (parameter.grad - want[name]).norm()
        assert error <= 1e-4 * want[name].norm() + 1e-5, name


def test_compiled_it_stands_between_graphs_that_last() -> None:
    layer, x = layer_of(16, 16), torch.randn(5, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor) -> Tensor:
        return layer(x.sin()).cos().sum()

    compiled, graphs = torch.compile(block, backend=counter), []
    for _ in range(3):
        found = []
        for function in (block, compiled):
            layer.zero_grad()
            function(x).backward()
            found.append(layer.weight.grad.clone())
        torch.testing.assert_close(*found)
        optimizer.step()
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[2] > 0


@pytest.mark.parametrize("kind", [*tiny_siglip.KINDS, *tiny_families.KINDS])
def test_every_layer_of_other_families(kind: str) -> None:
    if kind in tiny_siglip.KINDS:
        models, batch = [tiny_siglip.tiny_model(kind) for _ in range(2)], tiny_siglip.tiny_inputs(kind)
    else:
        models, batch = [tiny_families.tiny_family(kind)[0] for _ in range(2)], tiny_siglip.tiny_inputs("siglip")
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for model in models:
        clipft.fuse(model).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    to_switchback(models[0])
    got, want = (gradients(model, batch) for model in models)
    layers = [module for module in models[0].modules() if isinstance(module, SwitchBackLinear)]
    assert len(layers) == LAYERS and all(layer._codes is not None for layer in layers)
    assert got.keys() == want.keys() and F.cosine_similarity(joined(got), joined(want), dim=0) > 0.98


ON_EACH_RANK = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ranks import leave
from test_switchback import gradients, joined, model_in_int8, tiny_batch

dist.init_process_group("gloo")
model, batch = model_in_int8(), tiny_batch()
batch = {name: value.roll(dist.get_rank(), 0) for name, value in batch.items()}
own = joined(gradients(model, batch))
both = [torch.empty_like(own) for _ in range(2)]
dist.all_gather(both, own)
got = joined(gradients(DistributedDataParallel(model), batch))
torch.testing.assert_close(got, (both[0] + both[1]) / 2, rtol=1e-4, atol=1e-6)
leave()
"""


def test_processes_share_gradients() -> None:
    run_ranks(f"import sys\nsys.path[:0] = {import_paths(__file__)!r}\n{ON_EACH_RANK}")
