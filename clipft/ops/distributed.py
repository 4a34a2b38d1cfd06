"""Losses of a batch that the processes of a group hold together: rows gathered, and the work of one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipft.ops.kernels import call, refuse_second_derivative

__all__ = ["GroupContrastive", "GroupSigmoid", "gather_rows", "no_labels", "row_counts", "with_other_ranks"]


def no_labels(like: Tensor) -> Tensor:
    """What the ops take for "each pair only of itself"."""
    return torch.empty(0, dtype=torch.int64, device=like.device)


# ---- processes in a group ----


def row_counts(rows: int, like: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Of each rank, on every rank."""
    counts = [torch.zeros(1, dtype=torch.int64, device=like.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=like.device), group=group)
    return [int(c) for c in counts]


def gather_rows(tensor: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, in rank order; ranks may hold different numbers of them."""
    most = max(counts)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def with_other_ranks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks, in rank order; the gradient is that of this rank's own."""
    counts = row_counts(len(tensor), tensor, group)
    begin = sum(counts[: dist.get_rank(group)])
    every = gather_rows(tensor.detach(), counts, group)
    return torch.cat([every[:begin], tensor, every[begin + len(tensor) :]])


def _joined(op: str, image: Tensor, text: Tensor, group: dist.ProcessGroup) -> tuple[list[int], int, Tensor]:
    """Rows per rank, where this rank's begin, and the texts of all ranks."""
    counts = row_counts(image.shape[0], image, group)
    if sum(counts) == 0:
        raise ValueError(f"clipft.{op}: image_embeds must hold at least one pair and one feature, got none on any rank")
    return counts, sum(counts[: dist.get_rank(group)]), gather_rows(text, counts, group)


def _own_text_gradient(ctx: Any, d_texts: Tensor) -> Tensor:
    """This rank's rows of the sum over ranks; summed in float32."""
    total = d_texts.float()
    dist.all_reduce(total, group=ctx.group)
    return total[ctx.offset : ctx.offset + ctx.counts[dist.get_rank(ctx.group)]].to(ctx.dtype)


class GroupContrastive(torch.autograd.Function):
    """Rank k holds the images of rows k and gathers all texts: its rows of logits are whole, and its columns are merged
    over the ranks by one all-gather of their logsumexps. Its image gradients are then complete; its text gradients are
    summed over the ranks. Two gathers and one reduction of [N, D] or less, and every logit is computed on one rank
    only.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        labels: Tensor | None,
        smoothing: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        counts, offset, texts = _joined("contrastive_loss", image, text, group)
        n = sum(counts)
        labels = no_labels(image) if labels is None else gather_rows(labels, counts, group)
        keep = any(ctx.needs_input_grad[:3])
        _, row_lse, col_lse, target, tiles = call(
            torch.ops.clipft.contrastive_loss_shard,
            image,
            texts,
            scale,
            labels,
            smoothing,
            keep,
            offset,
            name="contrastive_loss",
        )
        columns = [torch.empty_like(col_lse) for _ in counts]
        dist.all_gather(columns, col_lse, group=group)
        col_lse = torch.logsumexp(torch.stack(columns), dim=0)
        rows = row_lse.sum() - 2.0 * target
        dist.all_reduce(rows, group=group)
        ctx.save_for_backward(image, texts, scale, labels, row_lse, col_lse, tiles)
        ctx.counts, ctx.offset, ctx.smoothing, ctx.group, ctx.dtype = counts, offset, smoothing, group, text.dtype
        return ((rows + col_lse.sum()) / (2 * n)).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        image, texts, scale, labels, row_lse, col_lse, tiles = ctx.saved_tensors
        needs_image, needs_text = ctx.needs_input_grad[:2]
        d_image, d_texts, d_scale = call(
            torch.ops.clipft.contrastive_loss_backward,
            grad,
            image,
            texts,
            scale,
            labels,
            ctx.smoothing,
            ctx.offset,
            row_lse,
            col_lse,
            tiles,
            needs_image,
            needs_text,
        )
        dist.all_reduce(d_scale, group=ctx.group)
        d_text = _own_text_gradient(ctx, d_texts) if needs_text else None
        return d_image if needs_image else None, d_text, d_scale, None, None, None


class GroupSigmoid(torch.autograd.Function):
    """As :class:`GroupContrastive`; the loss is a sum over pairs, so nothing but sums crosses ranks besides the
    texts."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Tensor | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        counts, offset, texts = _joined("sigmoid_loss", image, text, group)
        labels = no_labels(image) if labels is None else gather_rows(labels, counts, group)
        needs_image, needs_text, *needs_scalars = ctx.needs_input_grad[:4]
        needs = needs_image, needs_text, any(needs_scalars)
        op = torch.ops.clipft.sigmoid_loss_shard
        loss, *gradients = call(op, image, texts, scale, bias, labels, *needs, offset, name="sigmoid_loss")
        dist.all_reduce(loss, group=group)
        ctx.save_for_backward(*gradients)
        ctx.counts, ctx.offset, ctx.group, ctx.dtype = counts, offset, group, text.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        refuse_second_derivative()
        needs_image, needs_text = ctx.needs_input_grad[:2]
        d_image, d_texts, scalars = ctx.saved_tensors
        scalars = grad * scalars
        dist.all_reduce(scalars, group=ctx.group)
        d_text = _own_text_gradient(ctx, grad * d_texts) if needs_text else None
        return (grad * d_image).to(ctx.dtype) if needs_image else None, d_text, scalars[0], scalars[1], None, None
