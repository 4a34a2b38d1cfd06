"""``forward`` of a fused model: embeddings, the loss from clipft's op, and no matrix of logits unless it is asked for.

A family's mixin has Hugging Face's signature and runs the towers; what comes after is the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipft.families.losses import LOSSES

if TYPE_CHECKING:
    from clipft.families.family import Family, TowerName

__all__ = [
    "PairForward",
    "class_before",
    "given",
    "is_watched",
    "loss_parameters",
    "normalised",
    "records",
    "stand_in",
]


class PairForward:
    """What the mixins of all families have in common.

    Attributes:
        output_class: a Hugging Face output with, last, ``logit_scale``, ``logit_bias`` if the model has one, and
            ``head_weights``: what a loss outside the model needs.
    """

    accepts_loss_kwargs = False  # HF's Trainer asks: the loss is a mean over the batch it sees
    output_class: type

    if TYPE_CHECKING:  # transformers evaluates the annotations that are there when it runs
        _clipft_family: Family
        logit_scale: nn.Parameter

        get_image_features: Callable[..., Any]
        get_text_features: Callable[..., Any]

    def _contrast(
        self,
        pictures: dict[str, Any],
        texts: dict[str, Any],
        *,
        return_loss: bool | None,
        return_logits: bool | None = None,
        image_pooler_output: Tensor | None = None,
        text_pooler_output: Tensor | None = None,
        text_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward``, from what ``get_image_features`` and ``get_text_features`` take: see
        :class:`clipft.families.clip.CLIPForward`."""
        if return_logits is None:
            return_logits = not return_loss
        kwargs = given(kwargs)
        images = words = vision = text = None
        if image_pooler_output is not None:
            images, vision = self._of_pooled("vision", image_pooler_output)
        elif pictures["pixel_values"] is not None:
            vision = self._of_pictures(pictures, return_logits, kwargs)
            images = vision.pooler_output
        if text_pooler_output is not None:
            words, text = self._of_pooled("text", text_pooler_output)
        elif texts["input_ids"] is not None:
            text = self.get_text_features(**texts, **kwargs)
            words = text.pooler_output
        return self._pairs(
            images,
            words,
            return_loss=return_loss,
            return_logits=return_logits,
            text_index=text_index,
            vision_output=vision,
            text_output=text,
        )

    def _of_pooled(self, tower: TowerName, pooled: Tensor) -> tuple[Tensor, Any]:
        """The embeddings, before they are normalised, of what a tower gave, and the output that has them, if any."""
        return pooled, None

    def _of_pictures(self, pictures: dict[str, Any], all_tokens: bool, kwargs: dict[str, Any]) -> Any:
        """The image tower's output; ``all_tokens``: its last hidden state is asked for."""
        return self.get_image_features(**pictures, **kwargs)

    def _pairs(
        self,
        image_features: Tensor | None,
        text_features: Tensor | None,
        *,
        return_loss: bool | None,
        return_logits: bool,
        text_index: Tensor | None = None,
        vision_output: Any = None,
        text_output: Any = None,
    ) -> Any:
        """The rest of ``forward``, from embeddings of any length.

        Embeddings are L2-normalised in float32, whatever the towers compute in: at a scale of 100, bfloat16 embeddings
        would move logits by tenths.

        Args:
            image_features: [N, D]; ``text_features`` [U, D].
            return_loss: compute the loss of the family.
            return_logits: form the matrix [N, N].
            text_index: [N], the text of each picture, where texts that are equal come once.
            vision_output, text_output: of the towers, for the result.
        """
        if (image_features is None or text_features is None) and (return_loss or return_logits):
            raise ValueError(
                "forward: expected pixel_values and input_ids; one of them alone gives embeddings (return_logits=False)"
            )
        image_embeds = None if image_features is None else normalised(image_features)
        text_embeds = None if text_features is None else normalised(text_features)
        if text_index is not None and text_embeds is not None:
            text_embeds = text_embeds[text_index]
        scale = self.logit_scale.exp().reshape(())  # sharded, it is [1]
        bias = self.logit_bias.reshape(()) if hasattr(self, "logit_bias") else None
        loss = logits = None
        if return_loss:
            row = LOSSES[self._clipft_family.of(self).loss]
            loss = row(image_embeds, text_embeds, scale, *((bias,) if row.needs_bias else ()))
        if return_logits:
            assert image_embeds is not None and text_embeds is not None
            logits = scale * image_embeds @ text_embeds.t()
            logits = logits if bias is None else logits + bias
        return self.output_class(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
            logit_scale=scale,
            **({} if bias is None else {"logit_bias": bias}),
            head_weights=_head_weights(self),
        )


def class_before(form: Any, plain: Any, make: Callable[[Any, Any], Any], name: str, **own: Any) -> Any:
    """A class for instances of ``plain``, with ``form`` before it. Pickle and deepcopy, which would look for it by its
    name, ask ``make(form, plain)`` for it.
    """
    own |= {"__doc__": form.__doc__, "__reduce__": lambda self: (_new, (make, form, plain), vars(self))}
    return type(name, (form, plain), own)


def _new(make: Callable[[Any, Any], Any], form: type, plain: type) -> Any:
    kind = make(form, plain)
    return kind.__new__(kind)


@functools.cache
def stand_in(mixin: Any, plain: Any) -> Any:
    """The class that instances of ``plain`` are taken over by until ``clipft.unfuse``: with its name, by which FSDP's
    wrapping policies go.
    """
    named = {"__module__": plain.__module__, "_clipft_stands_in_for": plain}
    return class_before(mixin, plain, stand_in, plain.__name__, **named)


def given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what a peft model with a ``task_type`` hands on unset, such as ``inputs_embeds=None``: towers that take
    it from their caller would have it twice.
    """
    return {name: value for name, value in kwargs.items() if value is not None}


def loss_parameters(output: Any) -> tuple[Tensor, ...]:
    """What losses take besides embeddings, of a fused model's output: the heads' weights, the scale, and the bias if
    there is one.
    """
    bias = getattr(output, "logit_bias", None)
    return (*(output.head_weights or ()), output.logit_scale, *(() if bias is None else (bias,)))


def _head_weights(model: Any) -> tuple[Tensor, ...] | None:
    """[C, D] each, as an output of forward: several processes share the gradients of what they find in its graph."""
    weights = tuple(head.weight.view_as(head.weight) for head in getattr(model, "heads", ()))
    return weights or None


def records(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether hidden states or attentions of all tokens are asked for, by a tower's configuration or by a call."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name) or getattr(config, name, False) for name in names)


# transformers' leaves, which records() knows of, and FSDP's, which look at no tokens
_HOOKS_OF_OTHERS = ("transformers.utils.output_capturing", "torch.distributed.fsdp")


def is_watched(*modules: nn.Module) -> bool:
    """Whether someone waits for calls of one of these modules, by a hook or in a forward of his own: what a fused
    forward does not call, or calls for some tokens alone, must then run as Hugging Face's does."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any("forward" in vars(module) or _has_hooks(module) for module in modules)


def _has_hooks(module: nn.Module) -> bool:
    """Of the user's."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(
        not getattr(hook, "__module__", "").startswith(_HOOKS_OF_OTHERS) for hooks in kinds for hook in hooks.values()
    )


def normalised(embeds: Tensor) -> Tensor:
    """[N, D], each row at length 1; float32 or wider."""
    wide = torch.promote_types(embeds.dtype, torch.float32)
    return embeds / torch.linalg.vector_norm(embeds, dim=-1, keepdim=True, dtype=wide)
