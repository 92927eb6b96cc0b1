"""Jitter: weights changed by chance, each as much as another edit changes it.

Paper: neuron-lm-head

    W <- W + noise |delta| / |noise|,   noise normal, for each matrix; |.| over its entries

It is the null of an edit of weights (a fine-tuning, a rank-one change): a change of the same
matrices by the same amount, in a direction that nobody has learned.

Reads as: what is left after the jitter is left after any change of that size. Does not show what a
change as likely to be learned would do: trained changes have few directions, noise has all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.models.lm import LM


def jitter(delta: Float[Tensor, "*axes"], generator: torch.Generator) -> Float[Tensor, "*axes"]:
    """Normal noise of the shape and the norm of a change."""
    noise = torch.randn(delta.shape, generator=generator).to(delta.device, torch.float32)
    return (noise * (delta.float().norm() / noise.norm())).to(delta.dtype)


@torch.no_grad()
def edit(lm: LM, request: Edit, *, seed: int = 0) -> Edit:
    """An edit by chance of the weights that another one changes: `with jitter.edit(lm, made): ...`.

    request: the other edit, of a model with the same parameters; only its weights are looked at.
    seed: of the noise, which does not depend on the size of the change. Raises InputError for an
    edit that changes no weight, or one of another model.
    """
    if not request.deltas:
        raise InputError(
            f"the edit ({request.note or 'without a note'}) changes no weight: there is no size to "
            "take over. Give one that does, such as `fine_tune.edit(...)`."
        )
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: jitter(delta, generator) for name, delta in request.deltas.items()}
    return Edit(lm, deltas=deltas, note=f"as much by chance as: {request.note or 'an edit'}")
