"""nn.QuantizedLinear packs its weights once, and answers with what ``weight_int8`` reads as, whoever wrote to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipft import ops, reference
from clipft.nn import QuantizedLinear

X = torch.randn(4, 72, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(-127, 128, (40, 72), dtype=torch.int8, generator=torch.Generator().manual_seed(1))


def layer_of(seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    return QuantizedLinear.from_linear(nn.Linear(72, 40))


def check(layer: Callable[[Tensor], Tensor], of: QuantizedLinear | None = None) -> None:
    own: Any = of or layer
    want = reference.quantized_linear(X, own.weight_int8, own.weight_scale, own.bias).float()
    torch.testing.assert_close(layer(X), want, rtol=1e-4, atol=1e-4)


def inference(layer: QuantizedLinear) -> None:
    with torch.inference_mode():
        layer.weight_int8.copy_(CODES)


def item(layer: QuantizedLinear) -> None:
    layer.weight_int8[3, 5] = 99


def view(layer: QuantizedLinear) -> None:
    layer.weight_int8.view(-1)[7:90].neg_()


def row_of_transpose(layer: QuantizedLinear) -> None:
    layer.weight_int8.t()[2].fill_(1)


def rows(layer: QuantizedLinear) -> None:
    for row in layer.weight_int8.unbind():
        row.zero_()


def held(layer: QuantizedLinear) -> None:
    weight = layer.weight_int8
    weight.zero_()
    weight[1] = 5


def out(layer: QuantizedLinear) -> None:
    torch.neg(CODES, out=layer.weight_int8)


def augmented(layer: QuantizedLinear) -> None:
    layer.weight_int8 //= 2


WRITES: dict[str, Callable[[QuantizedLinear], Any]] = {
    "copy_": lambda layer: layer.weight_int8.copy_(CODES),
    ".data.copy_": lambda layer: layer.weight_int8.data.copy_(CODES),
    ".detach().zero_": lambda layer: layer.weight_int8.detach().zero_(),
    "inference mode": inference,
    "an item": item,
    "a view": view,
    "a view of a transpose": row_of_transpose,
    "rows": rows,
    "twice in what was read": held,
    "out=": out,
    "an operator": augmented,
    "nn.init": lambda layer: nn.init.constant_(layer.weight_int8, 3),
    "assignment": lambda layer: setattr(layer, "weight_int8", CODES),
    "load_state_dict": lambda layer: layer.load_state_dict(layer_of(1).state_dict()),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(layer_of(1).state_dict(), assign=True),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_writes_are_followed(write: str, compiled: bool) -> None:
    layer = layer_of()
    before, run = layer.weight_int8.clone(), torch.compile(layer, backend="eager") if compiled else layer
    check(run, layer)
    WRITES[write](layer)
    assert not torch.equal(layer.weight_int8, before)
    check(run, layer)


def test_what_torch_does_not_see_changes_what_was_read_alone() -> None:
    layer = layer_of()
    before = layer.weight_int8.clone()
    layer.weight_int8.numpy()[:] = 3
    assert torch.equal(layer.weight_int8, before)
    check(layer)


def test_a_tensor_read_before_an_assignment_is_not_written_back() -> None:
    layer = layer_of()
    old = layer.weight_int8
    layer.weight_int8 = CODES
    with pytest.raises(RuntimeError, match="weight_int8 was changed since this tensor was read from it; read it again"):
        old.zero_()
    assert torch.equal(layer.weight_int8, CODES)


def test_other_memory_for_what_was_read_is_refused() -> None:
    weight = layer_of().weight_int8
    with pytest.raises(RuntimeError, match="expected a change in place or an assignment of weight_int8 itself"):
        weight.data = CODES


def test_replaced_again_and_again() -> None:
    layer = layer_of()  # the allocator gives the same address back
    for _ in range(20):
        for _ in range(2):
            layer.weight_int8, layer.weight_scale = ops.quantize_weight(torch.randn(40, 72))
        check(layer)


def test_a_wrong_assignment_is_refused() -> None:
    layer = layer_of()
    with pytest.raises(TypeError, match="weight_int8 must be int8, got float32"):
        layer.weight_int8 = CODES.float()
    with pytest.raises(ValueError, match=r"weight_int8 must be \[out, in\], \[40, 72\], got shape \[39, 72\]"):
        layer.weight_int8 = CODES[1:]
    check(layer)


def test_no_call_packs_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a first one either; copies, moves and dtypes pack when they are made."""
    layer = layer_of()
    layers = [layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer_of().to(torch.bfloat16).float()]
    with torch.device("meta"):
        meta = QuantizedLinear(72, 40)
    meta.load_state_dict(layer.state_dict(), assign=True)
    emptied = QuantizedLinear(72, 40, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    targets: list[str] = []

    def graphs(graph: Any, examples: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr("clipft.ops.packed.PackedWeight._pack", None)
    for own in (*layers, meta, emptied):
        check(own)
        check(torch.compile(own, backend=graphs), own)
    called = " ".join(targets)
    assert "quantized_chain" in called and "quantized_pack" not in called and "quantized_unpack" not in called


def test_what_is_saved_is_plain() -> None:
    layer = layer_of()
    layer.weight_int8 = CODES
    state = layer.state_dict()
    assert sorted(state) == ["bias", "weight_int8", "weight_scale"] and type(state["weight_int8"]) is Tensor
    assert torch.equal(state["weight_int8"], CODES) and type(copy.deepcopy(layer.weight_int8)) is Tensor
    assert type(pickle.loads(pickle.dumps(layer.weight_int8))) is Tensor


def test_missing_and_misshapen_codes_are_told() -> None:
    layer, state = layer_of(), layer_of(1).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_int8: expected \[40, 72\], got \[39, 72\]"):
        layer.load_state_dict(state | {"weight_int8": CODES[1:]})
    del state["weight_int8"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_int8"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["weight_int8"]


def test_float16_denormals_are_torchs_own_where_denormals_are_flushed() -> None:
    x = torch.arange(-1100, 1100, dtype=torch.int16).abs().view(torch.float16).repeat(2, 1)
    x[1].neg_()
    want = reference.quick_gelu(x.float()).half()
    assert torch.set_flush_denormal(True)
    try:
        got = ops.quick_gelu(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want) and (want != 0).sum() > 4000
