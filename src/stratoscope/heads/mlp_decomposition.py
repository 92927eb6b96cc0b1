"""What an MLP makes of the heads before it: its output at the last token as a sum of theirs, by
least squares.

Paper: factual-recall-pipeline

    mlp.out[n] ~ sum_h coefficient[layer, head] * o[n, head] + stream[layer] * resid_pre[n] +
    intercept[layer]

n runs over prompts, o[n, head] is what a head of the same layer writes at the last token.
Coefficients are single numbers, shared by prompts and dimensions; the intercept is one vector. They
minimise the squared error over all prompts and dimensions. The paper fits heads' coefficients and
an intercept so; that the incoming stream joins them, so that what it explains does not fall to the
heads, is our choice. explained is R2 about the prompts' mean.

A coefficient below 0 says that the MLP erases what the head wrote (-1: all of it), above 0 that it
amplifies it. The intercept is what the MLP adds whatever the subject is.

null: the same fit on heads and stream of another prompt each.
Reads as: which heads' messages an MLP weakens or strengthens, as far as `explained` goes beyond its
null. Does not show what the MLP does that is no multiple of what it read, such as recalling a fact:
that is in the rest, 1 - explained.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.engine.writes import head_writes
from stratoscope.errors import InputError, SiteError
from stratoscope.models import source
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def decompose(
    out: Float[Tensor, "example dim"], parts: Float[Tensor, "example part dim"]
) -> tuple[Float[Tensor, " part"], Float[Tensor, " dim"], Float[Tensor, ""]]:
    """Coefficients, intercept and R2 of out ~ parts, one number for each part; of equal fits the
    shortest."""
    centred, target = parts - parts.mean(dim=0), out - out.mean(dim=0)
    table = centred.transpose(1, 2).flatten(0, 1)  # (example * dim, part)
    gram = table.T @ table
    coefficient = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ (table.T @ target.flatten())
    rest = target.flatten() - table @ coefficient
    intercept = out.mean(dim=0) - torch.einsum("p,pd->d", coefficient, parts.mean(dim=0))
    return coefficient, intercept, 1 - rest.square().sum() / target.square().sum()


@torch.no_grad()
def measure(lm: LM, inputs: Any) -> xr.Dataset:
    """coefficient (layer, head), stream, explained, null (layer) and intercept (layer, dim), over
    all prompts.

    inputs: prompts of one kind, such as a relation asked of many subjects. Raises InputError for a
    single prompt, and SiteError where the MLP does not read what the heads of its layer wrote
    (parallel blocks) or the stream is no sum.
    """
    lm.layout.resolve("layers.*.resid_mid")
    if lm.family.towers[""].residual != "sequential":
        raise SiteError(
            f"{lm.family.name}'s MLP does not read a sum of stream and heads, so it has no such "
            "parts."
        )
    source.refuse(lm, "its MLPs read more than the stream and what the heads of the layer wrote")
    batch = lm.batch(inputs)
    if len(batch) < 2:
        raise InputError("one prompt has no variation that parts could explain: give at least two.")
    points = ("resid_pre", "attn.z", "mlp.out")
    sites = [f"layers.*.{point}" for point in points]
    seen = capture(lm, batch, *sites, positions=lm.readout.place(batch))
    pieces: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for layer in range(lm.dims.layers):
        stream, z, out = (seen[f"layers.{layer}.{point}"] for point in points)
        parts = torch.cat([head_writes(lm, layer, z)[0], stream.double()[:, None]], dim=1)
        shuffled = decompose(out.double(), parts.roll(1, dims=0))
        pieces.append((*decompose(out.double(), parts), shuffled[2]))
    coefficient, intercept, explained, null = (
        torch.stack(column).float() for column in zip(*pieces)
    )
    return dataset(
        {
            "coefficient": (("layer", "head"), coefficient[:, :-1]),
            "stream": (("layer",), coefficient[:, -1]),
            "intercept": (("layer", "dim"), intercept),
            "explained": (("layer",), explained),
            "null": (("layer",), null),
        },
        method="heads.mlp_decomposition",
        provenance=lm.provenance,
        settings={"prompts": len(batch)},
        coords={"layer": list(range(lm.dims.layers)), "head": list(range(lm.dims.heads))},
        null_kind="the same fit on the heads and the stream of the next prompt in the list",
    )
