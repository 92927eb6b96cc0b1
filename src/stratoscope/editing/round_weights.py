"""Round weights: every matrix of the layers rounded to a few bits.

Paper: concept-depth

    step[out] = max over in of |W[out, in]| / (2^(bits - 1) - 1)
    W[out, in] <- round(W[out, in] / step[out]) step[out]

2^bits - 1 even steps around zero, one scale for each output: the plainest of the ways in which
weights are made coarser. Embeddings and the LM head stay as they are.

Reads as: what a model still does with weights as coarse as these. Does not show what a published
format of as many bits would do: these have a scale for each few dozen weights, and lose less.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.models.lm import LM

FEWEST, MOST = 2, 16


def rounded(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """The nearest of 2^bits - 1 even steps, one scale for each output."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


@torch.no_grad()
def edit(lm: LM, request: int = 8) -> Edit:
    """An edit that rounds weights: `with round_weights.edit(lm, 4): lm(...)`.

    request: bits, 2 to 16. Raises InputError for another number of bits, or a model of which no
    matrix is to be rounded.
    """
    if not FEWEST <= request <= MOST:
        raise InputError(f"{request} bits: weights are rounded to {FEWEST} to {MOST} of them.")
    head = {id(module) for module in lm.layout.head or ()}
    # weights shared with an embedding have its name, and stay as they are
    own = dict(lm.model.named_parameters())
    deltas = {}
    for name, module in lm.model.named_modules():
        plain = isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in own
        if not plain or id(module) in head:
            continue
        weight = module.weight.detach()
        rows = weight.T if isinstance(module, Conv1D) else weight  # Conv1D holds (in, out)
        delta = rounded(rows, request) - rows
        deltas[f"{name}.weight"] = delta.T.contiguous() if isinstance(module, Conv1D) else delta
    if not deltas:
        raise InputError(
            f"{lm.family.name} has no linear layer besides its head: nothing to round."
        )
    return Edit(lm, deltas=deltas, note=f"layers rounded to {request} bits")
