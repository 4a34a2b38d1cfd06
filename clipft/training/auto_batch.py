"""How many pairs the towers can see at once: counted, not tried out, for a CPU out of memory is not an exception.

What a step keeps for its backward pass grows with the pairs in a chunk; autograd tells the bytes. Beside it stand the
gradients of one layer at a time, and what does not grow: the parameters' gradients and the optimiser's state. Fewer
pairs at once change nothing but memory: the loss still takes the whole batch (:mod:`clipft.grad_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["available_memory", "fitting_chunk", "step_bytes"]

_MARGIN = 0.85  # share of the free memory that may be used: allocators do not fill their blocks
_ADAM = 2  # its two moments
_SAMPLE = 2  # pairs, as which memory is counted


def fitting_chunk(
    model: nn.Module,
    forward: Callable[[int], Any],
    batch_size: int,
    *,
    checkpointing: bool = False,
    memory: int | None = None,
) -> int:
    """The most pairs, up to ``batch_size``, whose step fits into memory.

    Args:
        model: what trains, in training mode.
        forward: from a number of pairs to the outputs for as many, with a graph.
        checkpointing: the run will use gradient checkpointing, which is not on yet.
        memory: bytes that may be used; default: most of what is free on the model's device.

    Raises:
        ValueError: a single pair does not fit.
    """
    free = available_memory(next(model.parameters()).device) if memory is None else memory
    room = _MARGIN * free - (1 + _ADAM) * sum(
        p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
    )
    one, two = (step_bytes(model, forward, pairs, checkpointing) for pairs in (1, 1 + _SAMPLE))
    each = max((two - one) / _SAMPLE, 1.0)
    fits = int(1 + (room - one) / each)
    if fits < 1:
        raise ValueError(
            f"auto_batch: one pair needs {one / 1e9:.1f} GB beside gradients and optimiser, {max(room, 0) / 1e9:.1f} "
            "GB are left; freeze a tower, train an adapter, or use gradient checkpointing"
        )
    return min(fits, batch_size)


def step_bytes(model: nn.Module, forward: Callable[[int], Any], pairs: int, checkpointing: bool = False) -> float:
    """Bytes of a step's peak that grow with the pairs: what is kept for the backward pass, and one layer's gradients;
    with checkpointing also that layer's forward pass made again, and its temporaries.
    """
    kept = _saved_bytes(model, forward, pairs)
    layer = kept / _layers(model)
    if not checkpointing:
        return kept + layer
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    try:
        return _saved_bytes(model, forward, pairs) + 3 * layer
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def available_memory(device: torch.device) -> int:
    """Free bytes, of a GPU or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # accelerate brings it

    return int(psutil.virtual_memory().available)


def _saved_bytes(model: nn.Module, forward: Callable[[int], Any], pairs: int) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold on to the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward(pairs)
    del outputs  # alive so far, so that no address came twice
    return sum(storages.values())


def _layers(model: nn.Module) -> int:
    """Of the shorter tower."""
    return min((len(part) for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) > 1), default=1)
