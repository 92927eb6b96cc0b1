"""Scramble keys: inside the block every head's keys have their dimensions permuted, so that
attention is no longer what was learned.

Paper: verbatim-memory

    attn.k[layer][position, head, d] <- attn.k[layer][position, head, order[layer, head, d]]

order is one permutation for each key head of each layer, drawn from the seed. As many numbers of
the same size meet the queries, but not the dimensions that they were trained to meet: what is left
is attention by chance, with all other weights as they are. The paper permutes the key weights;
without rotary positions that is the same, and with them the positions are scrambled too.

Reads as: what a model does without learned attention. Does not show which head did it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import permuted
from stratoscope.errors import InputError
from stratoscope.models.lm import LM


def orders(heads: int, head_dim: int, *, layer: int, seed: int = 0) -> Int[Tensor, "head head_dim"]:
    """One permutation of the dimensions for each key head of a layer."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(heads)])


def edit(lm: LM, request: Sequence[int] | None = None, *, seed: int = 0) -> Edit:
    """An edit that scrambles keys: `with scramble_keys.edit(lm): lm(...)`.

    request: layers, default all. seed: of the permutations. Raises SiteError for a layer that is
    not there or whose keys cannot be seen, InputError for an empty list.
    """
    if request is not None and not len(request):
        raise InputError("no layers are named: give some, or None for all.")
    names = ["layers.*.attn.k"] if request is None else [f"layers.{n}.attn.k" for n in request]
    changes = []
    for site in lm.layout.resolve(names):
        sizes = lm.layout.sizes(site)
        order = orders(sizes["kv_head"], sizes["head_dim"], layer=site.layer or 0, seed=seed)
        changes.append(permuted(site, order))
    return Edit(lm, changes)
