"""Edge attribution with integrated gradients (EAP-IG): EAP with the gradient averaged over the way
between the prompts.

Paper: textbook (Hanna et al., "Have Faith in Faithfulness", 2024)

    effect[u -> v] = sum_position  delta_u . mean_t (d metric / d x_v)(x_0 + t (x_1 - x_0)) /
                                   (d(source) - d(base))

x_0 and x_1 are what enters layer 0 in the base and the source run; t takes `steps` midpoints of
0..1 (the paper's right ends lean to one of the prompts). delta, x_v, keys and values of grouped
queries, direction and sign are those of `circuits.edge_attribution`. The entry is the embedding as
layer 0 receives it, positions included.

null: every delta replaced, position by position, by a random direction of the same length.
Reads as: which edges are worth a look, also where attention saturates at either prompt. Does not
show what a mixture of two prompts never visits, and is no measured effect: check the strong edges
by path patching.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor

from stratoscope.circuits import edge_attribution
from stratoscope.engine.edges import Ends, ends
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair
from stratoscope.engine.wiring import wiring
from stratoscope.errors import InputError
from stratoscope.models.lm import LM

_NUMBERS = 2**26  # that the copies of one layer's input may take at once


def averaged_slopes(one: Ends, deltas: Tensor, steps: int) -> Tensor:
    """`edge_attribution.slopes`, averaged over midpoints of the way from the base's to the source's
    embeddings: as many of them in one pass as memory allows, one inside an outer change."""
    first, way = one.base.writes[:1], one.source.writes[:1] - one.base.writes[:1]
    along = (torch.arange(steps, device=way.device) + 0.5) / steps
    points = first + along[:, None, None] * way
    lm = one.layers.lm
    copies = 3 * lm.dims.heads * way.numel()  # of each point, one for each side of each head
    changed = any(edits for edits, _ in lm.taps.listening)
    many = 1 if changed else max(1, _NUMBERS // copies)
    parts = [edge_attribution.slopes(one, deltas, start=some) for some in points.split(many)]
    return torch.stack(parts).sum(dim=0) / steps
    many = 1 if changed else max(1, _NUMBERS // copies)
    return (
        sum(edge_attribution.slopes(one, deltas, start=some) for some in points.split(many)) / steps
    )


def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "noise",
    steps: int = 10,
    seed: int = 0,
) -> xr.Dataset:
    """Averaged first-order effect and null of every edge: (example, edge), with sender, receiver
    and their layers.

    inputs, corrupt: prompts in pairs of equal token length. answer, foil: `metric.Whole` texts are
    scored with all their tokens (`engine.edges.ends`). steps: points on the way; the price is
    as many forward and backward passes. Raises SiteError for a family without edges, InputError as
    `engine.pair` does or for no steps.
    """
    if steps < 1:
        raise InputError(f"steps={steps}: integrated gradients need at least one point.")
    prompts = pair(lm, inputs, corrupt, answer, foil, direction)
    mask = wiring(lm).mask
    slopes = []
    for rows in ends(lm, prompts):
        sent = ((one, edge_attribution.with_null(one, seed)) for one in rows)
        each = [averaged_slopes(one, deltas, steps)[:, mask] for one, deltas in sent]
        slopes.append(torch.stack(each).sum(dim=0))
    settings = {"direction": direction, "steps": steps}
    return edge_attribution.labelled(
        lm, prompts, slopes, "circuits.edge_attribution_ig", settings, seed
    )
