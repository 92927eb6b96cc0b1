"""Low-rank attention: leave a head only a few directions of its queries and keys, those that some
prompts use most.

Paper: mcq-circuit-chinchilla

    Q = queries of the head at the asking tokens of the prompts,  (n, head_dim);   K = keys at the
                                                                  tokens asked about
    P_Q, P_K = projections on the first `rank` right singular vectors of Q and of K
    score[query, key] = (P_Q q) . (P_K k)

P_K is taken over to the query, q <- P_K P_Q q: the same score, and no other head that shares these
keys (grouped queries) is changed. The vectors are those whose product is the score, after rotary
embedding. The paper leaves open whether a mean is taken away first; here it is not, so that one
direction holds what all keys share.

null: `null=seed` projects on as many random directions.
Reads as: how simple a head's question is, where outputs stay the same. Does not show what the
directions mean, nor that they serve on other prompts: measure there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import project_out
from stratoscope.engine.select import Positions
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM


def complement(x: Float[Tensor, "row head_dim"], rank: int) -> Float[Tensor, "rest head_dim"]:
    """Orthonormal directions of all that the first `rank` right singular vectors of x leave."""
    return torch.linalg.svd(x.float(), full_matrices=True).Vh[rank:]


@torch.no_grad()
def edit(
    lm: LM,
    request: Sequence[Sequence[int]],
    *,
    prompts: Any = None,
    queries: Positions = -1,
    keys: Positions = None,
    rank: int = 3,
    null: int | None = None,
) -> Edit:
    """An edit that leaves heads `rank` directions of query and of key, at the positions `queries`.

    request: heads as (layer, head). prompts: those that say which directions matter. queries, keys:
    at which of their tokens (default each one's last, and all). null: a seed; random directions in
    the place of the prompts' own. Raises InputError for a head that is not there, a rank outside 1
    .. head_dim - 1, and without prompts.
    """
    heads = [tuple(head) for head in request]
    wrong = [
        h
        for h in heads
        if len(h) != 2 or not (0 <= h[0] < lm.dims.layers and 0 <= h[1] < lm.dims.heads)
    ]
    if wrong or not heads:
        raise InputError(
            f"heads are (layer, head), at least one, of {lm.dims.layers} x {lm.dims.heads}; got "
            f"{heads}."
        )
    if prompts is None:
        raise InputError(
            "give `prompts=` that show what the heads look for: their queries and keys say what is "
            "kept."
        )
    batch = lm.batch(prompts)
    asks = capture(
        lm,
        batch,
        *(f"layers.{layer}.attn.q" for layer, _ in heads),
        positions=[queries] if isinstance(queries, int) else queries,
    )
    has = capture(lm, batch, *(f"layers.{layer}.attn.k" for layer, _ in heads), positions=keys)
    # padding left out
    asking, keys_at = (batch.text[1] if where is None else ... for where in (queries, keys))
    generator = None if null is None else torch.Generator().manual_seed(null)
    changes = []
    for layer, head in heads:
        q, k = asks[f"layers.{layer}.attn.q"], has[f"layers.{layer}.attn.k"]
        # not `dims.head_dim`, which is that of values: latent attention's queries are wider
        size = q.shape[-1]
        if not 1 <= rank < size:
            raise InputError(
                f"rank={rank}: choose 1 to {size - 1}, less than the width of a head's queries and "
                "keys."
            )
        q = q[:, :, head][asking].reshape(-1, size)
        k = k[:, :, head * k.shape[2] // lm.dims.heads][keys_at].reshape(-1, size)
        if generator is not None:
            q, k = (torch.randn(rank, size, generator=generator).to(x) for x in (q, k))
        changes += [
            project_out(
                f"layers.{layer}.attn.q", complement(x, rank), units=[head], positions=queries
            )
            for x in (q, k)
        ]
    names = ", ".join(f"L{layer}H{head}" for layer, head in heads)
    return Edit(lm, changes, note=f"queries and keys of {names} at rank {rank}")
