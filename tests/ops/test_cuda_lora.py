"""lora_linear's and quick_gelu's CUDA kernels and the C that launches them, on an emulated GPU: the CPU's cases and
tolerances."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from emulated_cuda import ROOT, EmulatedCuda
from lora_cases import (
    BF16,
    CASES,
    F16,
    F32,
    TENSOR_CORES,
    LoraCase,
    assert_within,
    check_gradients_only_where_needed,
    exact,
    ours,
)
from scripts import Script
from tiny_clip import tiny_model
from torch.utils.checkpoint import checkpoint

import clipft
from clipft import reference
from clipft.ops import dropout_mask, quick_gelu, quick_gelu_lora_linear

AFFORDABLE = [c for c in CASES if math.prod(c.shape) * c.rank < 700_000]
BLOCKS = [LoraCase((1000, 20), 12, 3, 0.2, True), LoraCase((300, 20), 12, 20, 0.2, dtype=BF16)]  # more than one of rows


@pytest.mark.parametrize("case", [*AFFORDABLE, *BLOCKS], ids=str)
def test_cuda_lora_against_float64(case: LoraCase, cuda: EmulatedCuda) -> None:
    before = cuda.launches()
    got = ours(case)
    assert got[0].dtype == case.dtype and got[0].shape == (*case.shape[:-1], case.out)
    assert_within(case, got, exact(case), on_gpu=True)
    assert cuda.launches() > before


@pytest.mark.parametrize("case", TENSOR_CORES, ids=str)
def test_cuda_lora_takes_tensor_cores_for_aligned_bfloat16(case: LoraCase, cuda: EmulatedCuda) -> None:
    for kernel in ("down", "up", "outer"):
        before = cuda.launches(f"lora_tensor_{kernel}"), cuda.launches(f"lora_{kernel}")
        ours(case)
        assert cuda.launches(f"lora_tensor_{kernel}") == before[0] + {"down": 2, "up": 2, "outer": 3}[kernel]
        assert cuda.launches(f"lora_{kernel}") == before[1]


OLDER = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from emulated_cuda import EmulatedCuda
from lora_cases import TENSOR_CORES, assert_within, exact, ours
gpu = EmulatedCuda(Path({folder!r}))
with gpu.installed():
    for case in TENSOR_CORES:
        assert_within(case, ours(case), exact(case))
print(gpu.launches("lora_tensor"), gpu.launches("lora_down_bf16") > 0)
"""


def test_cuda_lora_on_a_gpu_without_the_instruction(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    """sm_75 multiplies bfloat16 by float32's."""
    code = OLDER.format(tests=[str(ROOT / "tests")], folder=str(emulated_cuda_folder))
    done = Script(code, XDG_CACHE_HOME=str(tmp_path), EMULATED_CAPABILITY="75").finish()
    assert (done.returncode, done.stdout.split()) == (0, ["0", "True"]), done.stderr


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("needed", [0, 1, 2, 4, 8, 16, 25])
def test_cuda_lora_gradients_only_where_needed(
    needed: int, activation: bool, dtype: torch.dtype, cuda: EmulatedCuda
) -> None:
    check_gradients_only_where_needed(needed, activation, dtype)


def test_cuda_lora_mask_is_the_cpus(cuda: EmulatedCuda) -> None:
    for rows, cols in ((1, 1), (3, 300), (70, 33), (0, 4)):
        for seed in (0, -1, 2**62 + 12345):
            for p in (0.0, 0.1, 0.999):
                assert torch.equal(
                    dropout_mask(seed, rows, cols, p), reference.dropout_mask(seed, rows, cols, p).float()
                )


def test_cuda_lora_is_the_same_every_time_and_in_a_checkpoint(cuda: EmulatedCuda) -> None:
    case = LoraCase((600, 30), 25, 4, 0.4)
    want = ours(case)
    assert all(torch.equal(a, b) for a, b in zip(ours(case), want, strict=True))
    tensors = case.tensors()
    torch.manual_seed(3)
    y = checkpoint(
        lambda *args: clipft.lora_linear(*args, case.scaling, dropout=0.4, training=True), *tensors, use_reentrant=False
    )
    y.backward(case.upstream())
    assert all(torch.equal(g, w) for g, w in zip([y.detach(), *(t.grad for t in tensors)], want, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(5))
def test_cuda_lora_nan_and_inf_come_through(which: int, value: float, cuda: EmulatedCuda) -> None:
    tensors = [t.detach().clone() for t in LoraCase((30, 40), 20, 3, 0.5).tensors()]
    tensors[which].view(-1)[7] = value
    tensors = [t.requires_grad_() for t in tensors]
    y = clipft.lora_linear(*tensors, 2.0, dropout=0.5, training=True)
    assert not y.isfinite().all()
    y.backward(torch.ones_like(y))
    if which in (1, 3, 4):
        assert not tensors[0].grad.isfinite().all()


def test_cuda_lora_mixed_dtypes_round_as_peft_does(cuda: EmulatedCuda) -> None:
    """A bfloat16 layer with float32 adapters: base rounded, branch added in float32, one rounding."""
    x, w, b, a, c = (t.detach() for t in LoraCase((40, 64), 48, 8, dtype=BF16, lora_dtype=F32).tensors())
    want = torch.nn.functional.linear(x, w, b) + (x.float() @ a.t() @ c.t()) * 2.0
    got = clipft.lora_linear(x, w, b, a, c, 2.0)
    assert (got != want.to(BF16)).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1,), (0, 4), (3, 300), (2, 3, 4, 5)])
def test_cuda_quick_gelu(shape: tuple[int, ...], dtype: torch.dtype, cuda: EmulatedCuda) -> None:
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    y = quick_gelu(x)
    y.backward(torch.ones_like(y))
    wide = x.detach().double().requires_grad_()
    want = reference.quick_gelu(wide)
    want.backward(torch.ones_like(want))
    close = {"rtol": torch.finfo(dtype).eps * (8 if dtype == F32 else 0.51), "atol": 1e-6}
    torch.testing.assert_close(y.double(), want, **close)
    torch.testing.assert_close(x.grad.double(), wide.grad, **close)


def test_cuda_lora_model_has_the_cpus_gradients(emulated_gpu: EmulatedCuda) -> None:
    """A fused peft model, whose loss, activation and layers all are kernels."""
    g = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(4, 3, 32, 32, generator=g), torch.randint(0, 500, (4, 12), generator=g)

    def step() -> tuple[torch.Tensor, ...]:
        model = clipft.add_lora(tiny_model(), r=4, dropout=0.2).train()
        torch.manual_seed(1)
        loss = model(pixel_values=pixels, input_ids=ids, return_loss=True).loss
        return (loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    want = step()
    with emulated_gpu.installed():
        before = emulated_gpu.launches()
        got = step()
        assert emulated_gpu.launches() > before + 50
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_cuda_lora_contracts(cuda: EmulatedCuda) -> None:
    x, w, b, a, c = LoraCase((6, 8), 5, 2).tensors()
    seed = torch.tensor(5)
    torch.library.opcheck(torch.ops.clipft.lora_linear.default, (x, w, b, a, c, seed, 2.0, 0.3, True))
    torch.library.opcheck(torch.ops.clipft.quick_gelu.default, (x,))
    y = torch.compile(lambda *args: clipft.lora_linear(*args, 2.0), fullgraph=True)(x, w, b, a, c)
    torch.testing.assert_close(y, clipft.lora_linear(x, w, b, a, c, 2.0))
    with pytest.raises(RuntimeError, match=r"lora_b must be \[out, r\], \[5, 2\], got shape \[5, 3\]"):
        torch.ops.clipft.lora_linear(x, w, b, a, torch.ones(5, 3), seed, 2.0)
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor, got float32"):
        torch.ops.clipft.lora_linear(x, w, b, a, c, torch.tensor(1.0), 2.0, 0.5)
    with pytest.raises(RuntimeError, match=r"rows and cols must not be negative, got -1 and 3"):
        torch.ops.clipft.dropout_mask(seed, -1, 3, 0.5)


def test_cuda_lora_keeps_no_copy_of_the_input(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and activations are made again: nothing as large as the input is allocated but its own gradient."""
    x, w, b, a, c = LoraCase((2000, 20), 12, 3, 0.2, True).tensors()
    monkeypatch.setenv("EMULATED_MEMORY", str(2000 * 16))
    y = quick_gelu_lora_linear(x.detach(), w.detach(), b, a, c, 2.0, dropout=0.2, training=True)
    y.sum().backward()
    monkeypatch.setenv("EMULATED_MEMORY", "1000")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        clipft.lora_linear(x, w, b, a, c, 2.0)
