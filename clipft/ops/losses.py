"""The losses as functions over ``torch.ops.clipft.*``: fake kernels, autograd, and the checks that C cannot make.

The C ops compute a loss and what its backward pass needs, which of the sigmoid loss are its gradients but for the
upstream one; ``torch.library`` connects them to autograd and
torch.compile. Inside a process group each rank works on the rows of its own images against the texts of all ranks: see
``clipft.ops.distributed``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipft.ops import reference
from clipft.ops.distributed import GroupContrastive, GroupSigmoid, no_labels
from clipft.ops.kernels import (
    FLOATS,
    autocasts,
    call,
    check_floats,
    check_fraction,
    check_tensors,
    dtype_name,
    has_kernel,
    no_second_derivative,
    refuse_second_derivative,
    shape_of,
    wants_plain,
    without_autocast,
)

__all__ = ["contrastive_loss", "sigmoid_loss"]

_TILE = 1024  # CLIPFT_TILE in csrc/kernels/loss/loss.h
_KEEP = 40 * 1024 * 1024 // 4  # CLIPFT_KEEP in csrc/ops/loss_inputs.h


# ---- public functions ----


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Symmetric contrastive loss of CLIP (arXiv:2103.00020), without the N x N matrix of logits.

    Args:
        image_embeds: [N, D] float32, bfloat16 or float16, L2-normalised by the caller.
        text_embeds: [N, D], same dtype and device; row i belongs to image i.
        logit_scale: the multiplier itself (``model.logit_scale.exp()``), as in open_clip: a one-element tensor, which
            gets a gradient, or a float.
        labels: [N] int64; pairs of equal label are positives of each other. Default: each pair only of itself.
        label_smoothing: e in [0, 1); targets q become (1 - e) q + e / N.
        group: a ``torch.distributed`` group whose ranks' pairs are negatives too (ranks may hold different N). Every
            rank gets the loss of the joined batch, the gradients of its own embeddings, and the whole gradient of
            ``logit_scale``. DDP, which averages over ranks, wants the embeddings' gradients times the world size:
            ``clipft.CLIPTrainer`` sees to that.

    Returns:
        0-d float32 tensor: the mean of the image-to-text and the text-to-image cross-entropy. Logits, sums and
        gradients are accumulated in float32 or better whatever the inputs' dtype. NaN or Inf in gives NaN.
        The result does not depend on the number of threads beyond what the BLAS's own products do. On a GPU the two
        products of the backward pass take their coefficients in the embeddings' dtype; float32 products use TF32 where
        ``torch.backends.cuda.matmul`` allows it, and nothing waits for the device.

    Raises:
        TypeError: a dtype that is not supported (float64 among them) or that differs between the embeddings.
        ValueError: a shape, device, label count or smoothing that does not fit.
        NotImplementedError: on a device that the kernels do not run on (a GPU without a CUDA driver or NVRTC, or
            another kind), with ``group`` or in an environment with ``CLIPFT_STRICT=1``. Otherwise plain torch computes
            it there, with a warning that tells the cause.
        torch.OutOfMemoryError: as torch raises it.
    """
    name = "contrastive_loss"
    image_embeds, text_embeds = _embeds(name, image_embeds, text_embeds)
    scale = _scalar(name, "logit_scale", logit_scale, image_embeds)
    check_fraction(name, "label_smoothing", label_smoothing)
    if labels is not None:
        _check_labels(name, labels, image_embeds, text_embeds)
    if not _has_kernel(name, image_embeds, text_embeds, group, scale):
        embeds = image_embeds.float(), text_embeds.float()
        with without_autocast(image_embeds.device):
            return reference.contrastive_loss(*embeds, scale, labels=labels, label_smoothing=label_smoothing)
    if group is not None:
        return GroupContrastive.apply(image_embeds, text_embeds, scale, labels, float(label_smoothing), group)
    if labels is None:
        labels = no_labels(image_embeds)
    keep = _needs_grad(image_embeds, text_embeds, scale)
    smoothing = float(label_smoothing)
    return call(torch.ops.clipft.contrastive_loss, image_embeds, text_embeds, scale, labels, smoothing, keep)[0]


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of SigLIP (arXiv:2303.15343), without the N x N matrix of logits: the sum over all pairs
    divided by N.

    Arguments, dtypes, errors and ``group`` are those of :func:`contrastive_loss`; ``logit_bias`` is a one-element
    tensor, which gets a gradient, or a float. Returns a 0-d float32 tensor.
    """
    name = "sigmoid_loss"
    image_embeds, text_embeds = _embeds(name, image_embeds, text_embeds)
    scale = _scalar(name, "logit_scale", logit_scale, image_embeds)
    bias = _scalar(name, "logit_bias", logit_bias, image_embeds)
    if labels is not None:
        _check_labels(name, labels, image_embeds, text_embeds)
    if not _has_kernel(name, image_embeds, text_embeds, group, scale, bias):
        with without_autocast(image_embeds.device):
            return reference.sigmoid_loss(image_embeds.float(), text_embeds.float(), scale, bias, labels=labels)
    if group is not None:
        return GroupSigmoid.apply(image_embeds, text_embeds, scale, bias, labels, group)
    if labels is None:
        labels = no_labels(image_embeds)
    needs = _needs_grad(image_embeds), _needs_grad(text_embeds), _needs_grad(scale, bias)
    return call(torch.ops.clipft.sigmoid_loss, image_embeds, text_embeds, scale, bias, labels, *needs)[0]


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---- arguments ----


def _embeds(op: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast of one dtype, as autocast does for torch's own losses."""
    check_tensors(op, image_embeds=image, text_embeds=text)
    if autocasts(image.device) and image.dtype != text.dtype:
        image, text = (t.float() if t.dtype in FLOATS else t for t in (image, text))
    return image, text


def _scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """0-d float32 on the embeddings' device, differentiable if a tensor came."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"clipft.{op}: {name} must be a float or a float tensor, got {dtype_name(value)}")
        if value.numel() != 1:
            raise ValueError(f"clipft.{op}: {name} must have one element, got shape {shape_of(value)}")
        check_tensors(op, image_embeds=like, **{name: value})
        return value.reshape(()).float()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"clipft.{op}: {name} must be a float or a float tensor, got {type(value).__name__}")
    return torch.full((), float(value), dtype=torch.float32, device=like.device)  # no copy, which a GPU would wait for


def _check_labels(op: str, labels: Tensor, image: Tensor, text: Tensor) -> None:
    """In C empty ones are none. Of embeddings that do not fit is told elsewhere."""
    check_tensors(op, image_embeds=image, labels=labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"clipft.{op}: labels must be int64, got {dtype_name(labels)}")
    if labels.shape != image.shape[:1] and image.shape == text.shape:
        raise ValueError(
            f"clipft.{op}: labels must have one entry per pair, {shape_of(image)[:1]}, got shape {shape_of(labels)}"
        )


def _has_kernel(op: str, image: Tensor, text: Tensor, group: dist.ProcessGroup | None, *scalars: Tensor) -> bool:
    """Whether the op runs. Where something comes before it or in its place, what it would find is found here."""
    instead = "Plain torch computes it, with the N x N matrix of logits"
    plainly = wants_plain(image, text, *scalars)
    if plainly and group is not None:
        raise NotImplementedError(f"clipft.{op}: with a process group there is backward alone, and no ONNX")
    needed = None if group is None else "a process group"
    here = not plainly and has_kernel(op, image, instead, op.removesuffix("_loss"), needed=needed)
    if group is not None or not here or image.is_meta:
        _check_embeds(op, image, text, group is not None)
    return here


def _check_embeds(op: str, image: Tensor, text: Tensor, rank_may_be_empty: bool) -> None:
    """As csrc/ops/loss_inputs.c: between ranks all texts are gathered first, padded to the number of images."""
    check_floats(op, image_embeds=image, text_embeds=text)
    for name, tensor in (("image_embeds", image), ("text_embeds", text)):
        if tensor.dim() != 2:
            raise ValueError(f"clipft.{op}: {name} must be [N, D], got shape {shape_of(tensor)}")
    if text.dtype != image.dtype:
        raise TypeError(
            f"clipft.{op}: text_embeds must have the dtype of image_embeds, {dtype_name(image)}, got {dtype_name(text)}"
        )
    if text.shape != image.shape:
        raise ValueError(
            f"clipft.{op}: text_embeds must have the shape of image_embeds, {shape_of(image)}, got {shape_of(text)}"
        )
    if image.shape[1] == 0 or (image.shape[0] == 0 and not rank_may_be_empty):
        raise ValueError(
            f"clipft.{op}: image_embeds must hold at least one pair and one feature, got shape {shape_of(image)}"
        )


# ---- fake kernels ----


def _fake_tiles(image: Tensor, text: Tensor, keep: bool) -> Tensor:
    rows, cols = image.shape[0], text.shape[0]
    keep = keep and image.device.type != "cuda"
    room = _KEEP // cols
    kept = (rows if rows <= room else room // _TILE * _TILE) if keep else 0
    return image.new_empty((kept, cols), dtype=torch.float32)


@torch.library.register_fake("clipft::contrastive_loss")
def _(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor, smoothing: float = 0.0, keep: bool = False) -> Any:
    return (
        image.new_empty((), dtype=torch.float32),
        image.new_empty((image.shape[0],), dtype=torch.float64),
        image.new_empty((text.shape[0],), dtype=torch.float64),
        image.new_empty((), dtype=torch.float64),
        _fake_tiles(image, text, keep),
    )


@torch.library.register_fake("clipft::contrastive_loss_shard")
def _(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor, smoothing: float, keep: bool, row_offset: int) -> Any:
    return (
        image.new_empty((), dtype=torch.float32),
        image.new_empty((image.shape[0],), dtype=torch.float64),
        image.new_empty((text.shape[0],), dtype=torch.float64),
        image.new_empty((), dtype=torch.float64),
        _fake_tiles(image, text, keep),
    )


@torch.library.register_fake("clipft::sigmoid_loss")
def _(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_image: bool = False,
    needs_text: bool = False,
    needs_scalars: bool = False,
) -> Any:
    return _fake_sigmoid(image, text, needs_image, needs_text, needs_scalars)


@torch.library.register_fake("clipft::sigmoid_loss_shard")
def _(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_image: bool,
    needs_text: bool,
    needs_scalars: bool,
    row_offset: int,
) -> Any:
    return _fake_sigmoid(image, text, needs_image, needs_text, needs_scalars)


def _fake_sigmoid(image: Tensor, text: Tensor, needs_image: bool, needs_text: bool, needs_scalars: bool) -> Any:
    none, makes_image = (0, 0), needs_image or (needs_scalars and not needs_text)
    scalars = 2 if makes_image or needs_text else 0
    shapes = (), image.shape if makes_image else none, text.shape if needs_text else none, (scalars,)
    return tuple(image.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_gradients(image: Tensor, text: Tensor, needs_image: bool, needs_text: bool) -> tuple[Tensor, Tensor, Tensor]:
    none = (0, 0)
    return (
        image.new_empty(image.shape if needs_image or not needs_text else none),
        text.new_empty(text.shape if needs_text else none),
        image.new_empty((), dtype=torch.float32),
    )


@torch.library.register_fake("clipft::contrastive_loss_backward")
def _(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor,
    smoothing: float,
    row_offset: int,
    row_lse: Tensor,
    col_lse: Tensor,
    tiles: Tensor,
    needs_image: bool,
    needs_text: bool,
) -> Any:
    return _fake_gradients(image, text, needs_image, needs_text)


# ---- autograd ----


def _loss_alone_has_gradient(ctx: Any, *others: Tensor) -> None:
    """Nor does torch make zeros of the others' size for it."""
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _contrastive_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, labels, ctx.smoothing, _ = inputs
    _, row_lse, col_lse, target, tiles = output
    _loss_alone_has_gradient(ctx, row_lse, col_lse, target, tiles)
    ctx.save_for_backward(image, text, scale, labels, row_lse, col_lse, tiles)


def _contrastive_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    image, text, scale, labels, row_lse, col_lse, tiles = ctx.saved_tensors
    needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
    if not (needs_image or needs_text or needs_scale):
        return (None,) * 6
    d_image, d_text, d_scale = call(
        torch.ops.clipft.contrastive_loss_backward,
        grad,
        image,
        text,
        scale,
        labels,
        ctx.smoothing,
        0,
        row_lse,
        col_lse,
        tiles,
        needs_image,
        needs_text,
    )
    return (
        d_image if needs_image else None,
        d_text if needs_text else None,
        d_scale if needs_scale else None,
        None,
        None,
        None,
    )


def _sigmoid_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    _loss_alone_has_gradient(ctx, *gradients)
    ctx.save_for_backward(*gradients)
    ctx.dtype, ctx.made = inputs[0].dtype, inputs[5:8]


def _sigmoid_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second_derivative()
    needs_image, needs_text, *needs_scalars = ctx.needs_input_grad[:4]
    needs = needs_image, needs_text, any(needs_scalars)
    if any(need and not made for need, made in zip(needs, ctx.made, strict=True)):
        raise RuntimeError("clipft.sigmoid_loss: the op was called without needs_image, needs_text or needs_scalars")
    d_image, d_text, scalars = ctx.saved_tensors
    return (
        (grad * d_image).to(ctx.dtype) if needs_image else None,
        (grad * d_text).to(ctx.dtype) if needs_text else None,
        *(grad * scalars[k] if need else None for k, need in enumerate(needs_scalars)),
        *(None,) * 4,
    )


torch.library.register_autograd("clipft::contrastive_loss", _contrastive_gradients, setup_context=_contrastive_context)
torch.library.register_autograd("clipft::sigmoid_loss", _sigmoid_gradients, setup_context=_sigmoid_context)
torch.library.register_autograd("clipft::contrastive_loss_backward", no_second_derivative)
for _op in ("contrastive_loss", "sigmoid_loss"):
    torch.library.register_autocast(f"clipft::{_op}", "cpu", torch.float32)
