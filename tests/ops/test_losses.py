"""clipft.contrastive_loss and clipft.sigmoid_loss against float64, for every instruction set; torch's contracts; bad
input; memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    CASES,
    LABEL_CASES,
    SIGMOID_CASES,
    LossCase,
    check_contrastive,
    check_extreme_logits,
    check_sigmoid,
    check_sigmoid_bias_near_convergence,
    check_sigmoid_labels_near_convergence,
    run,
    unit,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

import clipft
import clipft.ops  # registers the fake kernels that opcheck runs
from clipft import reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contrastive_against_float64(case: LossCase, isa: str) -> None:
    check_contrastive(case)


@pytest.mark.parametrize("case", SIGMOID_CASES, ids=str)
def test_sigmoid_against_float64(case: LossCase, isa: str) -> None:
    check_sigmoid(case)


@pytest.mark.parametrize("case", LABEL_CASES, ids=str)
def test_sigmoid_with_labels_against_float64(case: LossCase, isa: str) -> None:
    check_sigmoid(case, labelled=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.n >= 300 and c.dtype == torch.float32], ids=str)
def test_no_worse_than_eager_float32(case: LossCase, isa: str) -> None:
    """The root mean square error against float64 is at most eager's, within the spread of two roundings of the same
    quality."""
    options = {"labels": case.labels(), "label_smoothing": case.smoothing}
    exact = run(reference.contrastive_loss, case, torch.float64, **options)
    ours = run(clipft.contrastive_loss, case, **options)
    eager = run(reference.contrastive_loss, case, torch.float32, **options)
    for name, o, e, x in zip(("image", "text"), ours[1:3], eager[1:3], exact[1:3], strict=True):
        floor = 2.0**-24 * x.pow(2).mean().sqrt()
        assert (o.double() - x).pow(2).mean().sqrt() <= 1.5 * (e.double() - x).pow(2).mean().sqrt() + floor, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_lose_only_the_rounding_of_the_result(dtype: torch.dtype, isa: str) -> None:
    case = LossCase(700, 96, 80.0, "paired", dtype=dtype)
    exact = run(reference.contrastive_loss, case, torch.float64)
    ours = run(clipft.contrastive_loss, case)
    eager = run(reference.contrastive_loss, case, torch.float32)
    assert abs(ours[0].double() - exact[0]) <= abs(eager[0].double() - exact[0]) + 2.0**-24 * exact[0]
    for o, e, x in zip(ours[1:3], eager[1:3], exact[1:3], strict=True):
        rounding = (x.to(dtype).double() - x).abs().max() * 1.01
        assert (o.double() - x).abs().max() <= (e.double() - x).abs().max() * 1.25 + rounding


# ---- what gets a gradient, and what is kept ----


@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True), (False, True, True)],
)
def test_gradients_only_where_needed(needs: tuple[bool, bool, bool], isa: str) -> None:
    args = [unit(), unit(seed=1), torch.tensor(20.0)]
    every = [a.clone().requires_grad_() for a in args]
    clipft.contrastive_loss(*every).backward()
    some = [a.clone().requires_grad_(need) for a, need in zip(args, needs, strict=True)]
    clipft.contrastive_loss(*some).backward()
    for a, b, need in zip(some, every, needs, strict=True):
        assert (a.grad is not None) == need
        if need:
            torch.testing.assert_close(a.grad, b.grad)


def test_scale_may_be_a_float_a_parameter_or_sixteen_bit() -> None:
    image, text = unit(), unit(seed=1)
    want = clipft.contrastive_loss(image, text, torch.tensor(16.0))
    assert clipft.contrastive_loss(image, text, 16.0) == want
    assert clipft.contrastive_loss(image, text, 16) == want
    scale = torch.nn.Parameter(torch.tensor([16.0], dtype=torch.bfloat16))
    loss = clipft.contrastive_loss(image, text, scale)
    loss.backward()
    assert loss == want and scale.grad.dtype == torch.bfloat16 and scale.grad.shape == (1,)


def test_upstream_gradient_scales_and_graph_can_be_retained() -> None:
    image = unit().requires_grad_()
    loss = clipft.contrastive_loss(image, unit(seed=1), 20.0)
    (once,) = torch.autograd.grad(loss, image, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, image)
    torch.testing.assert_close(thrice, 3 * once)


def test_used_twice_in_one_graph() -> None:
    image, text = unit().requires_grad_(), unit(seed=1).requires_grad_()
    (clipft.contrastive_loss(image, text, 20.0) + clipft.contrastive_loss(text, image, 20.0)).backward()
    single = unit().requires_grad_()
    clipft.contrastive_loss(single, unit(seed=1), 20.0).backward()
    torch.testing.assert_close(image.grad, 2 * single.grad)


def test_second_derivative_is_refused() -> None:
    image = unit().requires_grad_()
    (grad,) = torch.autograd.grad(clipft.contrastive_loss(image, unit(seed=1), 20.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_modules_wrap_the_functions() -> None:
    image, text = unit(), unit(seed=1)
    labels = torch.arange(24) // 2
    module = clipft.nn.ContrastiveLoss(label_smoothing=0.1)
    assert module(image, text, 20.0, labels) == clipft.contrastive_loss(
        image, text, 20.0, labels=labels, label_smoothing=0.1
    )
    assert clipft.nn.SigmoidLoss()(image, text, 20.0, -5.0) == clipft.sigmoid_loss(image, text, 20.0, -5.0)
    assert clipft.nn.SigmoidLoss()(image, text, 20.0, -5.0, labels) == clipft.sigmoid_loss(
        image, text, 20.0, -5.0, labels=labels
    )


# ---- special values ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("n", [5, 1030])
def test_nan_and_inf_come_out_as_nan(value: float, which: int, n: int, isa: str) -> None:
    args = [unit(n), unit(n, seed=1)]
    args[which][n // 2, 3] = value
    assert clipft.contrastive_loss(*args, 20.0).isnan()
    assert not clipft.sigmoid_loss(*args, 20.0, -5.0).isfinite()
    image = args[0].requires_grad_()
    clipft.contrastive_loss(image, args[1], 20.0).backward()
    assert image.grad.isnan().any()


def test_nan_scale_comes_out_as_nan(isa: str) -> None:
    assert clipft.contrastive_loss(unit(), unit(seed=1), float("nan")).isnan()


def test_extreme_logits_stay_finite(isa: str) -> None:
    check_extreme_logits()


# ---- torch's contracts ----


def op_samples(grad: bool) -> list[tuple]:
    none = torch.empty(0, dtype=torch.int64)
    image, text, scale = (
        unit().requires_grad_(grad),
        unit(seed=1).requires_grad_(grad),
        torch.tensor(20.0, requires_grad=grad),
    )
    labels = torch.arange(24) // 3
    return [
        (torch.ops.clipft.contrastive_loss.default, (image, text, scale, none, 0.0, grad)),
        (torch.ops.clipft.contrastive_loss.default, (image, text, scale, labels, 0.1, False)),
        (torch.ops.clipft.contrastive_loss.default, (image.bfloat16(), text.bfloat16(), scale, none, 0.0, grad)),
        *(
            (torch.ops.clipft.sigmoid_loss.default, (*embeds, scale, bias, labels, grad, grad, grad))
            for bias in (torch.tensor(-5.0, requires_grad=grad),)
            for embeds in ((image, text), (image.bfloat16(), text.bfloat16()))
        ),
    ]


def backward_samples() -> list[tuple]:
    image, text, scale, none = unit(), unit(seed=1), torch.tensor(20.0), torch.empty(0, dtype=torch.int64)
    _, row, col, _, tiles = torch.ops.clipft.contrastive_loss(image, text, scale, none, 0.0, True)
    shard = torch.ops.clipft.contrastive_loss_shard.default
    return [
        (shard, (image[:9], text, scale, none, 0.0, True, 5)),
        (
            torch.ops.clipft.contrastive_loss_backward.default,
            (torch.ones(()), image, text, scale, none, 0.0, 0, row, col, tiles, True, True),
        ),
        (
            torch.ops.clipft.contrastive_loss_backward.default,
            (torch.ones(()), image, text, scale, none, 0.0, 0, row, col, tiles, False, True),
        ),
        *(
            (torch.ops.clipft.sigmoid_loss_shard.default, (image[:9], text, scale, torch.tensor(-5.0), none, *needs, 5))
            for needs in itertools.product((False, True), repeat=3)
        ),
    ]


@pytest.mark.parametrize(
    "op, args", op_samples(True) + op_samples(False) + backward_samples(), ids=lambda x: getattr(x, "__name__", "")
)
def test_opcheck(op: Callable, args: tuple) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    def step(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        return clipft.contrastive_loss(
            F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp(), label_smoothing=0.1
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (12, 24, 31):
        args = [x.clone().requires_grad_() for x in (unit(n), unit(n, seed=1), torch.tensor(2.0))]
        want = [x.detach().clone().requires_grad_() for x in args]
        got_loss, want_loss = compiled(*args), step(*want)
        got_loss.backward()
        want_loss.backward()
        torch.testing.assert_close(got_loss, want_loss)
        for a, b in zip(args, want, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_sigmoid_compiles_to_one_graph() -> None:
    compiled = torch.compile(clipft.sigmoid_loss, fullgraph=True)
    args = [x.requires_grad_() for x in (unit(), unit(seed=1), torch.tensor(10.0), torch.tensor(-5.0))]
    torch.testing.assert_close(compiled(*args), clipft.sigmoid_loss(*args))
    labels = torch.arange(len(args[0])) % 5
    torch.testing.assert_close(compiled(*args, labels=labels), clipft.sigmoid_loss(*args, labels=labels))


def test_autocast_computes_in_float32() -> None:
    image, text = unit().requires_grad_(), unit(seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clipft.contrastive_loss(image, text, 20.0)
        bare = torch.ops.clipft.contrastive_loss(image, text, torch.tensor(20.0), torch.empty(0, dtype=torch.int64))[0]
    loss.backward()
    want = clipft.contrastive_loss(image.detach(), text.float(), 20.0)
    assert loss == want and bare == want and loss.dtype == torch.float32 and image.grad.dtype == torch.float32


def test_several_threads_at_once() -> None:
    args = [(unit(200 + k, 16, k), unit(200 + k, 16, k + 99)) for k in range(6)]
    want = [clipft.contrastive_loss(*a, 30.0).item() for a in args]
    got = [[] for _ in args]

    def work(k: int) -> None:
        for _ in range(20):
            got[k].append(clipft.contrastive_loss(*args[k], 30.0).item())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(args))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k, values in enumerate(got):
        assert values == pytest.approx([want[k]] * 20, rel=1e-6)


class LossRows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return clipft.contrastive_loss(unit(50, seed=index), unit(50, seed=index + 9), 20.0).item()


def test_in_dataloader_workers() -> None:
    loader = torch.utils.data.DataLoader(LossRows(), batch_size=1, num_workers=2)
    assert [float(x) for x in loader] == pytest.approx([LossRows()[k] for k in range(4)], rel=1e-6)


def test_same_result_every_time(isa: str) -> None:
    """With as many threads; with others, what the float64 reference has."""
    case, before = LossCase(1500, 64, 100.0, "paired"), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check_contrastive(case)
            first, second = run(clipft.contrastive_loss, case), run(clipft.contrastive_loss, case)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- memory ----

MEMORY = """
import sys, torch, clipft
from pathlib import Path
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
def args(n, d):
    return [x.requires_grad_() for x in (torch.randn(n, d), torch.randn(n, d), torch.tensor(1.0))]
loss = {loss}
loss(*args(300, 64)).backward()
inputs = args({n}, {d})
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
loss(*inputs).backward()
print(status("VmHWM:") - before - 2 * {n} * {d} * 4 / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "loss, limit",
    [("clipft.contrastive_loss", 64.0), ("lambda i, t, s: clipft.sigmoid_loss(i, t, s, -10.0)", 80.0)],
    ids=["contrastive", "sigmoid"],
)
def test_peak_memory_does_not_grow_with_the_square(loss: str, limit: float) -> None:
    """N = 16384, D = 512: the matrix of logits would be 1 GiB. Beyond inputs and gradients the peak may grow by 64 MB:
    the tiles that the contrastive loss keeps, the sigmoid loss's gradients before the upstream one, and a tile."""
    code = MEMORY.format(loss=loss, n=16384, d=512)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= limit


# ---- devices without a kernel ----


@pytest.mark.skipif(torch.version.cuda is None, reason="fake cuda tensors need a CUDA build of torch")
def test_a_device_without_a_kernel_takes_plain_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    monkeypatch.setattr(
        "clipft.ops.kernels._cuda_problem", lambda index, *code: "there is no CUDA driver: as the test wants it"
    )
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with FakeTensorMode():
        image, text = (torch.empty(6, 4, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        with pytest.warns(UserWarning, match=r"there is no CUDA driver: as the test wants it. Plain torch computes it"):
            loss = clipft.contrastive_loss(image, text, 10.0, label_smoothing=0.1)
        assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            clipft.contrastive_loss(image, text, 10.0)
        with pytest.warns(UserWarning, match="sigmoid_loss: the kernels do not run here: there is no CUDA driver"):
            assert clipft.sigmoid_loss(image, text, 10.0, -10.0).device.type == "cuda"
        monkeypatch.setenv("CLIPFT_STRICT", "1")
        with pytest.raises(NotImplementedError, match="the kernels do not run here: there is no CUDA driver"):
            clipft.contrastive_loss(image, text, 10.0)


def test_meta_tensors_have_shapes() -> None:
    """On a device without autocast."""
    image, text = (x.to("meta").requires_grad_() for x in LossCase(6, 4, 1.0).embeds())
    for loss in (clipft.contrastive_loss(image, text, 10.0), clipft.sigmoid_loss(image, text, 10.0, -5.0)):
        assert (loss.shape, loss.device.type) == ((), "meta")
        loss.backward()
        assert image.grad.shape == (6, 4)


def test_plain_torch_keeps_float32_logits_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = LossCase(64, 32, 100.0, "paired").embeds()
    losses = (clipft.contrastive_loss, lambda *args: clipft.sigmoid_loss(*args, -5.0))
    want = [loss(image, text, 100.0) for loss in losses]
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "as the test wants it")
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("ignore")
        for loss, value in zip(losses, want, strict=True):
            torch.testing.assert_close(loss(image, text, 100.0), value)


def test_sigmoid_bias_gradient_near_convergence(isa: str) -> None:
    check_sigmoid_bias_near_convergence(1024)


def test_sigmoid_labels_near_convergence(isa: str) -> None:
    check_sigmoid_labels_near_convergence()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, -1])
def test_every_nan_comes_out_nan(bits: int, isa: str) -> None:
    """exp works on the bits of its argument."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    embeds = torch.eye(40)
    bad = embeds.clone()
    bad[3, 7] = nan
    for loss in (
        clipft.contrastive_loss(bad, embeds, 10.0),
        clipft.sigmoid_loss(embeds, bad, 10.0, -5.0),
    ):
        assert loss.isnan()
