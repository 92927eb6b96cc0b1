"""Differential binary mask: the heads, neurons, dimensions or given directions of a site that carry
a variable, chosen by a mask that is learnt and then cut to 0 and 1.

Paper: textbook (Davies et al., "Discovering variable binding circuitry with desiderata", 2023; De
Cao et al., "Sparse interventions in language models with differentiable masking", 2022)

    h'   = h_base + m (h_source - h_base)        m = sigmoid(s / T), one for each unit; T from 1 to
                                                 0.01; of directions D (unit, dim): D^T m D
    loss = - log p(answer | base prompt with h' at the site) + sparsity * sum of m
    kept = s > 0

A unit of attn.z is a head; elsewhere it is a number of the site's vector: a neuron of mlp.act, a
dimension of the stream. `circuits.alignment_search` measures what is found and makes an edit of it.

Reads as: which units it takes to set the variable, at a price for each. Does not show that a unit
is about this variable alone (the price does not ask), nor what a variable that lies across units
does: there a rotation (`alignment_search`) needs fewer directions. Which units are kept hangs on
the price: where the accuracy of as many random ones is as good, it is nothing.
Cost: as `circuits.alignment_search`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.circuits._counterfactuals import Where, pairs, plain, site_of
from stratoscope.circuits._interchange import Alignment, kept, search
from stratoscope.errors import InputError
from stratoscope.models.fresh import untrained as untrained_twin
from stratoscope.models.lm import LM

_COLD = 0.01


class Mask(nn.Module):
    """s of every unit, at first 0: half of each is interchanged."""

    directions: Tensor | None

    def __init__(self, units: int, directions: Tensor | None) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(units))
        self.register_buffer("directions", directions)
        self._summed = self.scores.sum()

    def forward(
        self, base: Float[Tensor, "*rows"], source: Float[Tensor, "*rows"], along: float
    ) -> Float[Tensor, "*rows"]:
        mask = torch.sigmoid(self.scores / _COLD**along)
        self._summed = mask.sum()  # what `price` says of this step
        if self.directions is not None:
            own = self.directions
            return base + (((source - base) @ own.T) * mask) @ own
        return base + mask.reshape(-1, *[1] * (base.ndim - 3)) * (source - base)

    def price(self) -> Tensor:
        return self._summed

    def found(self) -> Tensor:
        """The units' numbers, or the directions as columns."""
        chosen = (self.scores.detach() > 0).nonzero()[:, 0].cpu()
        return chosen if self.directions is None else self.directions.cpu()[chosen].T.contiguous()


def fit(
    lm: LM,
    inputs: Any,
    *,
    site: str,
    directions: Tensor | None = None,
    sparsity: float = 0.01,
    positions: Where = -1,
    steps: int = 200,
    rate: float = 5e-2,
    untrained: bool = True,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Alignment:
    """The units of a site that carry what the pairs differ in, for `alignment_search.measure`.

    inputs, positions, untrained, folder: as `circuits.alignment_search.fit`. site: one with a
    vector at each token; of attn.z whole heads are chosen. directions: (unit, dim), orthonormal,
    in the place of the site's own numbers: principal components, an eraser's basis. sparsity: what
    a unit costs, in nats. Raises InputError where no unit is worth its price, and as
    `alignment_search.fit` does.
    """
    at = site_of(lm, site, flat=directions is not None)
    size = lm.layout.sizes(at)[at.axes[2]]
    given = None if directions is None else torch.as_tensor(directions).detach().float()
    if steps < 1 or rate <= 0 or sparsity < 0:
        raise InputError(
            f"steps={steps}, rate={rate}, sparsity={sparsity}: one step or more, a rate above 0, a "
            "price of 0 or more."
        )
    if given is not None and (
        given.ndim != 2
        or given.shape[1] != size
        or not torch.allclose(given @ given.T, torch.eye(len(given)).to(given), atol=1e-4)
    ):
        raise InputError(
            f"directions at `{at}` are orthonormal rows (unit, {size}); got {tuple(given.shape)}: "
            "torch.linalg.qr(x.T).Q.T makes them so."
        )
    settings = {"fit": "circuits.binary_mask", "site": str(at), "sparsity": sparsity, "rate": rate}
    settings |= {"positions": plain(positions), "steps": steps, "seed": seed}
    settings |= {"untrained": untrained, "unit": at.axes[2] if given is None else "direction"}
    settings |= {} if given is None else {"directions": [len(given), float(given.double().sum())]}
    ready = pairs(lm, inputs, at, positions)
    how = {"steps": steps, "rate": rate, "seed": seed}

    def masked(on: LM, ready: Any, place: Path | None) -> tuple[Tensor, list[Any]]:
        mask = Mask(size if given is None else len(given), given)
        curve = search(on, ready, mask, sparsity, **how, folder=place)
        return mask.found(), curve

    def make(about: dict[str, Any], work: Path | None) -> Alignment:
        found, curve = masked(lm, ready, work and work / "own")
        if not found.shape[-1]:
            raise InputError(
                f"no unit of `{at}` is worth its price of {sparsity} nats: lower sparsity, take "
                "more steps, or search at another site."
            )
        null = None
        if untrained:
            twin = untrained_twin(lm, seed=seed)
            place = work and work / "untrained"
            null = masked(twin, pairs(twin, inputs, at, positions), place)[0]
        return Alignment(
            site=str(at),
            found=found,
            untrained=null,
            positions=plain(positions),
            curve=curve,
            settings=about,
            seed=seed,
            provenance=lm.provenance,
        )

    return kept(lm, ready, settings, folder, make)
