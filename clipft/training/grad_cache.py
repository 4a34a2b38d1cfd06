"""Gradient caching (Gao et al. 2021, arXiv:2101.06983): the loss of a large batch at the memory of a small one.

The loss needs every embedding of the batch at once, the towers do not. So the towers run over chunks without a graph;
the loss of all embeddings gives each its gradient; and the towers run over the chunks again, now with a graph that
lives for one chunk, to carry these gradients on. The second run draws the same random numbers as the first, so that
dropout is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipft.families.forward import loss_parameters

__all__ = ["cached_backward", "chunks"]

_IMAGE = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "image_pooler_output")
_TEXT = ("input_ids", "attention_mask", "text_pooler_output")
Loss = Callable[..., Tensor]


def cached_backward(
    model: nn.Module,
    inputs: dict[str, Tensor],
    chunk_size: int,
    loss_fn: Loss,
    *,
    backward: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Add the gradient of ``loss_fn`` over the whole batch to the model's parameters.

    Args:
        model: a fused model, also inside peft or ``DistributedDataParallel``.
        inputs: its inputs: pictures (pixels or features), texts (tokens or features) if the loss has any, and
            ``text_index`` where equal texts come once.
        chunk_size: pictures or texts that a tower sees at once.
        loss_fn: from image_embeds [N, D], text_embeds [N, D] or None, and what ``loss_parameters`` gives, to the loss.
        backward: of a scalar, as ``Tensor.backward`` or ``Accelerator.backward``.
        autocast: context of the forward passes.
        no_sync: context of the backward passes of all chunks but the last, where gradients are shared by processes.

    Returns:
        The loss, detached.
    """
    pieces = chunks(inputs, chunk_size)
    states, parts = [], []
    for chunk in pieces:
        states.append(_random_state())
        with torch.no_grad(), autocast():
            outputs = model(**chunk, return_logits=False)
        parts.append((outputs.image_embeds, outputs.text_embeds))
    index = inputs.get("text_index")
    loss, gradients, of_shared = _loss_and_gradients(parts, loss_parameters(outputs), index, loss_fn)
    for number, (chunk, state, gradient) in enumerate(zip(pieces, states, gradients, strict=True)):
        last = number == len(pieces) - 1
        with nullcontext() if last else no_sync():
            with _replayed(state), autocast():
                outputs = model(**chunk, return_logits=False)
            # the sum whose gradient is that of the loss
            embeds = (outputs.image_embeds, outputs.text_embeds)
            carried = [(e.float() * g).sum() for e, g in zip(embeds, gradient, strict=True) if g is not None]
            if last:
                shared = zip(loss_parameters(outputs), of_shared, strict=True)
                carried += [(own * g).sum() for own, g in shared if g is not None]
            total = torch.stack(carried).sum()
            if total.requires_grad:
                backward(total)
    return loss


Pair = tuple[Tensor | None, Tensor | None]  # of pictures and of texts, where the chunk has them


def _loss_and_gradients(
    parts: list[Pair], shared: tuple[Tensor, ...], text_index: Tensor | None, loss_fn: Loss
) -> tuple[Tensor, list[Pair], list[Tensor | None]]:
    """The loss of all embeddings, and its gradient for each chunk's embeddings and for what it shares."""
    sides = [[part for part in side if part is not None] for side in zip(*parts, strict=True)]
    images, texts = (torch.cat(side).detach().requires_grad_() if side else None for side in sides)
    leaves = [tensor.detach().requires_grad_() for tensor in shared]
    loss = loss_fn(images, texts if text_index is None or texts is None else texts[text_index], *leaves)
    loss.backward()
    pieces = [
        iter(() if joined is None else cast(Tensor, joined.grad).split([len(part) for part in side]))
        for joined, side in zip((images, texts), sides, strict=True)
    ]
    pairs = [
        tuple(None if part is None else next(own) for part, own in zip(pair, pieces, strict=True)) for pair in parts
    ]
    return loss.detach(), cast(list[Pair], pairs), [leaf.grad for leaf in leaves]


def chunks(inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Pictures and texts in pieces of `size`. Where one has fewer pieces they come last, together with the other's: the
    last chunk then uses every parameter, which is when processes share gradients."""
    sides = [
        [
            dict(zip(own, pieces, strict=True))
            for pieces in zip(*(tensor.split(size) for tensor in own.values()), strict=True)
        ]
        for own in ({name: inputs[name] for name in names if name in inputs} for names in (_IMAGE, _TEXT))
    ]
    count = max(map(len, sides))
    pieces: list[list[dict[str, Tensor]]] = [[{} for _ in range(count - len(side))] + side for side in sides]
    return [image | text for image, text in zip(*pieces, strict=True)]


def _random_state() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


@contextmanager
def _replayed(state: tuple[Tensor, Any]) -> Iterator[None]:
    """The random numbers of that state; afterwards those of before."""
    now = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
