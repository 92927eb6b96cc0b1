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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


def orders(heads: int, head_dim: int, *, layer: int, seed: int = 0) -> Int[Tensor, "head head_dim"]:
    """One permutation of the dimensions for each key head of a layer."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(heads)])


class Scrambled:
    """`with` this, the keys of these sites are permuted. Leaving the block takes it back."""

    def __init__(self, lm: LM, sites: Sequence[Site], seed: int) -> None:
        self.lm, self.sites, self.seed = lm, tuple(sites), seed
        self._open: list[ExitStack] = []

    def __enter__(self) -> Scrambled:
        edits: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {
            site: [partial(_permuted, layer=site.layer or 0, seed=self.seed)] for site in self.sites
        }
        with ExitStack() as opening:
            opening.enter_context(self.lm.taps.using(edits=edits))
            self._open.append(opening.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()


def edit(lm: LM, request: Sequence[int] | None = None, *, seed: int = 0) -> Scrambled:
    """An edit that scrambles keys: `with scramble_keys.edit(lm): lm(...)`.

    request: layers, default all. seed: of the permutations. Raises SiteError for a layer that is
    not there or whose keys cannot be seen, InputError for an empty list.
    """
    if request is not None and not len(request):
        raise InputError("no layers are named: give some, or None for all.")
    names = ["layers.*.attn.k"] if request is None else [f"layers.{n}.attn.k" for n in request]
    return Scrambled(lm, lm.layout.resolve(names), seed)


def _permuted(
    k: Float[Tensor, "example position head head_dim"], run: Run, *, layer: int, seed: int
) -> Float[Tensor, "example position head head_dim"]:
    order = orders(k.shape[-2], k.shape[-1], layer=layer, seed=seed).to(k.device)
    return k.gather(-1, order.expand(k.shape))
