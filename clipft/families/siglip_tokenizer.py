"""SigLIP's sentencepiece tokenizer as one of the ``tokenizers`` library: the same tokens where neither transformers nor
sentencepiece is."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

__all__ = ["fast_tokenizer"]

_SPACE = "\u2581"  # as which sentencepiece writes spaces
_UNIGRAM = 1  # of sentencepiece's kinds of model


def fast_tokenizer(tokenizer: Any) -> Tokenizer:
    """What stands in ``tokenizer.json``, also of a ``SiglipTokenizer``, which has no such file.

    Raises:
        ValueError: sentencepiece's model is not a unigram one, as all of SigLIP's are.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        backend: Tokenizer = tokenizer.backend_tokenizer
        return backend
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # what protobuf makes as it is imported
    model = messages.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    if model.trainer_spec.model_type != _UNIGRAM:
        raise ValueError("tokenizer: expected a unigram model of sentencepiece, as SigLIP's, found another kind")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unigram = Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)
    fast = Tokenizer(unigram)
    fast.normalizer = normalizers.Sequence(list(_steps(tokenizer.do_lower_case, model.normalizer_spec)))
    for _, token in sorted(tokenizer.added_tokens_decoder.items()):
        fast.add_special_tokens([token]) if token.special else fast.add_tokens([token])
    end = tokenizer.eos_token
    fast.post_processor = TemplateProcessing(single=["$A", end], special_tokens=[(end, tokenizer.eos_token_id)])
    return fast


def _steps(lower: bool, spec: Any) -> Iterator[normalizers.Normalizer]:
    """What ``SiglipTokenizer`` does to a text, and after it sentencepiece."""
    yield normalizers.Replace(_SPACE, " ")
    yield normalizers.Prepend(_SPACE)
    if lower:
        yield normalizers.Lowercase()
    yield normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")
    yield normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " ")  # Python counts the separators of files among spaces
    yield normalizers.Replace(Regex(" $"), "")
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", _SPACE)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(f"{_SPACE}+$"), "")
