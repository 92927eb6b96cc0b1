"""The loss of a language model, for whoever trains one or asks what a change costs it."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

_NONE = -100


def next_token_loss(
    logits: Float[Tensor, "row position vocab"],
    ids: Int[Tensor, "row position"],
    counted: Bool[Tensor, "row position"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every counted token by the logits one position before, in nats; the
    first of a row has none before it. NaN where nothing is counted."""
    labels = ids.masked_fill(~counted, _NONE)[:, 1:]
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=_NONE)
