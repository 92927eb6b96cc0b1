"""Top-k neurons: at every token each MLP keeps its k largest activations and drops the rest.

Paper: lazy-neuron

    a'[position, neuron] = a[position, neuron] if |a[position, neuron]| is among the k largest of
        its token, else 0

The paper keeps the k largest after ReLU, where nothing is negative; for other neurons the largest
in size are meant. Gradients flow through what is kept, so a model can also be trained inside the
block, as the paper does.

Reads as: what the largest activations carry alone, once outputs with and without the edit are
compared. Does not show that a model trained with all of them is as good inside: the paper trains
with it from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


def keep(act: Float[Tensor, "... neuron"], k: int) -> Float[Tensor, "... neuron"]:
    """The k largest in size of each row, 0 elsewhere; a tie is broken, so that never more than k
    are kept."""
    chosen = act.abs().topk(min(k, act.shape[-1]), dim=-1).indices
    return torch.zeros_like(act).scatter(-1, chosen, act.gather(-1, chosen))


class TopK:
    """`with` this, each of `layers` keeps as many neurons as it says: {site: k}. Leaving the block
    takes it back."""

    def __init__(self, lm: LM, kept: dict[Site, int]) -> None:
        self.lm, self.kept = lm, kept
        self._open: list[ExitStack] = []

    def __enter__(self) -> TopK:
        edits: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {
            site: [partial(_keep, k=k)] for site, k in self.kept.items()
        }
        with ExitStack() as opening:
            opening.enter_context(self.lm.taps.using(edits=edits))
            self._open.append(opening.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()


def edit(lm: LM, request: int | Sequence[Sequence[int]]) -> TopK:
    """An edit that keeps k neurons at each token: `with top_k.edit(lm, 64): lm(...)`.

    request: k for every layer, or (layer, k) for some; the smallest k counts where a layer is named
    twice. Inside the block the model is in evaluation mode (no dropout), as in all blocks. Raises
    SiteError for a layer that is not there or a mixture of experts, InputError for k below 0 or
    above the number of neurons.
    """
    pairs = [("*", request)] if isinstance(request, int) else [tuple(pair) for pair in request]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"a request is k, or pairs (layer, k), at least one; got {request!r:.80}.")
    kept: dict[Site, int] = {}
    for layer, k in pairs:
        for site in lm.layout.resolve(f"layers.{layer}.mlp.act"):
            if not 0 <= k <= lm.dims.neurons:
                raise InputError(
                    f"k={k}: each layer of this model has {lm.dims.neurons} neurons; keep 0 to as "
                    "many."
                )
            kept[site] = min(k, kept.get(site, k))
    return TopK(lm, kept)


def _keep(act: Tensor, run: Run, *, k: int) -> Tensor:
    return keep(act, k)
