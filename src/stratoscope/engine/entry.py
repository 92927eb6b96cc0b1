"""The entry of the stack, and what it would be if a token's embedding carried nothing: the
"without" of token methods.

    x = what enters layer 0.    blank = what would enter it if every token's embedding were one and
                                the same vector.

The replacement is made where the embedding is, and the model itself does the rest, so position
embeddings and embedding norms are the same in both: x - blank is what the tokens bring, and never
counts where they stand.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

ENTRY = "layers.0.resid_pre"
_CHUNK = 4096  # embeddings averaged at once: a large vocabulary is not copied whole


@torch.no_grad()
def entry(
    lm: LM, batch: Batch, blank: str | int
) -> tuple[Float[Tensor, "example position dim"], ...]:
    """x and blank, both (example, position, dim).

    blank: "zero", "mean" (the mean embedding of the vocabulary), or one token, as its text or its
    id. Raises SiteError for a model without token embeddings, InputError for inputs without tokens
    or a bad `blank`.
    """
    lm.layout.resolve(("embed", ENTRY))
    if batch.ids is None:
        raise InputError(
            "these inputs hold no token ids: token methods explain a prompt. Pass text or token "
            "ids."
        )
    vector = replacement(lm, blank)
    x = capture(lm, batch, ENTRY)[ENTRY]
    with intervene(lm, replaced("embed", vector)):
        return x, capture(lm, batch, ENTRY)[ENTRY]


def replacement(lm: LM, blank: str | int) -> Float[Tensor, " dim"]:
    """The embedding that stands in for a token: see `entry`."""
    [site] = lm.layout.resolve("embed")
    module = lm.layout.locate(site)[0]
    rows = module.weight.shape[0]
    ids = torch.arange(rows, device=module.weight.device)
    # `forward`, not the module itself: nobody who listens to the embedding should hear these calls
    if blank == "zero":
        return torch.zeros_like(module.forward(ids[:1])[0])
    if blank == "mean":
        return (
            sum(module.forward(i).double().sum(dim=0) for i in ids.split(_CHUNK)).to(
                module.weight.dtype
            )
            / rows
        )
    return module.forward(ids[_token(lm, blank)])


def evidence(batch: Batch) -> Bool[Tensor, "example position"]:
    """Where a token's embedding is what the model reads: real tokens, less those whose place an
    image takes."""
    real = torch.zeros(batch.ids.shape, dtype=torch.bool) if batch.mask is None else batch.mask
    return real if batch.image is None else real & ~batch.image


def _token(lm: LM, blank: str | int) -> int:
    if isinstance(blank, int):
        ids = [blank]
    elif lm.tokenizer is None:
        raise InputError(
            f"{blank!r} is neither 'zero' nor 'mean', and the model has no tokenizer: give a token "
            "id."
        )
    else:
        ids = lm.tokenizer(blank, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or not 0 <= ids[0] < lm.dims.vocab:
        raise InputError(
            f"{blank!r} stands for ids {ids}: give 'zero', 'mean', or one token of this vocabulary."
        )
    return ids[0]
