"""Edge attribution patching (EAP): the effect of every edge at once, to first order, from one
backward pass.

Paper: textbook (Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery", 2023)

    effect[u -> v] = sum_position  delta_u . (d metric / d x_v) / (d(source) - d(base))
    delta_u = write_u(source run) - write_u(base run)

x_v is the input of receiver v, and its gradient, taken in the base run, goes through v alone: for
"L3H2.k" through the keys as query head 2 reads them, so that grouped-query models have an edge for
each query head (`engine.edges`). It is the derivative of the exact effect that
`circuits.path_patching` measures. direction="noise": base is the clean run (as in the paper), and a
positive effect means that the edge carries the answer: with its corrupt value, the answer loses.

null: every delta replaced, position by position, by a random direction of the same length.
Reads as: which edges are worth a look, at the price of three passes. Does not show effects that are
not linear: where attention is saturated the gradient is small though the edge is needed. Check the
strong ones by path patching.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.alone import Layers
from stratoscope.engine.edges import Ends, ends
from stratoscope.engine.gradients import frozen, gradients
from stratoscope.engine.intervene import scaled
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import Pair, pair
from stratoscope.engine.tiled import tiled
from stratoscope.engine.wiring import SIDES, wiring
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset

NULL = "every change replaced, position by position, by a random direction of the same length"


def slopes(
    one: Ends, deltas: Float[Tensor, "kind sender position dim"], start: Tensor | None = None
) -> Float[Tensor, "kind receiver sender"]:
    """delta_u . d metric / d x_v, the derivative of each edge's exact effect; 0 where there is no
    edge.

    One forward and one backward pass of the model give the gradients at every head's z, every MLP's
    output and the last stream; from there each layer alone carries them back to its receivers.
    start: what enters layer 0 instead, (point, position, dim); of several points, the sum.
    """
    layers, lm = one.layers, one.layers.lm
    wires = wiring(lm)
    read = "resid_pre" if wires.parallel else "resid_mid"
    last = Site("", wires.layers - 1, "resid_post")
    points = dict.fromkeys(("resid_pre", read, "attn.z", "mlp.out"))
    sites = [*(Site("", n, point) for n in range(wires.layers) for point in points), last]
    # a site read as a view (z by heads) is not what the model goes on with unless someone edits it:
    # hence times one
    on = [scaled(f"layers.*.{point}", 1.0) for point in ("attn.z", "mlp.out")]
    batch = one.batch if start is None else tiled(one.batch, len(start))
    _, values, grads = gradients(lm, batch, sites, one.metric, start=start, interventions=on)
    parts = []
    with frozen(lm), torch.enable_grad(), layers:
        for layer in range(wires.layers):
            pre, mid = (values[Site("", layer, point)] for point in ("resid_pre", read))
            parts.append(into_heads(layers, layer, pre, grads[Site("", layer, "attn.z")]))
            mid = mid.clone().requires_grad_(True)
            written = layers.mlp(layer, mid)
            [slope] = torch.autograd.grad(written, mid, grads[Site("", layer, "mlp.out")])
            parts.append(slope[:, None])
    into = torch.cat([*parts, grads[last][:, None]], dim=1).flatten(2).to(deltas)
    return torch.einsum("ksx,rx->krs", deltas.flatten(2), into.sum(dim=0)) * wires.mask.to(into)


def into_heads(
    layers: Layers,
    layer: int,
    x: Float[Tensor, "point position dim"],
    dz: Float[Tensor, "point position head head_dim"],
) -> Float[Tensor, "point input position dim"]:
    """The gradient at x through each head's q, k and v alone (3 * head + side), given the gradient
    at z."""
    count = dz.shape[2]
    # one copy of x for each input: one backward for all
    copies = x.repeat_interleave(3 * count, dim=0).requires_grad_(True)
    heads = layers.attention(layer, copies)
    qkv = [getattr(heads, side).unflatten(0, (len(x), -1)) for side in SIDES]
    leaves = [y[:, 0].detach().requires_grad_(True) for y in qkv]
    slope = torch.autograd.grad(heads.z(*leaves), leaves, dz.transpose(1, 2))
    each = torch.arange(count, device=x.device)
    picked = [y[:, 3 * each + side, each] for side, y in enumerate(qkv)]
    return torch.autograd.grad(picked, copies, slope)[0].unflatten(0, (len(x), -1))


def with_null(one: Ends, seed: int) -> Float[Tensor, "kind=2 sender position dim"]:
    """What is sent along the edges: the deltas, and random directions of their lengths."""
    return torch.stack([one.delta, one.null(seed)])


def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "noise",
    seed: int = 0,
) -> xr.Dataset:
    """First-order effect and null of every edge: (example, edge), with coordinates sender, receiver
    and their layers.

    inputs, corrupt: prompts in pairs of equal token length. answer, foil: `metric.Whole` texts are
    scored with all their tokens (`engine.edges.ends`). Works with frozen weights. Raises
    SiteError for a family without edges, InputError when a pair's lengths differ or both runs give
    the same logit difference.
    """
    prompts = pair(lm, inputs, corrupt, answer, foil, direction)
    wires = wiring(lm)
    per_edge = [
        torch.stack([slopes(one, with_null(one, seed))[:, wires.mask] for one in rows]).sum(dim=0)
        for rows in ends(lm, prompts)
    ]
    return labelled(
        lm, prompts, per_edge, "circuits.edge_attribution", {"direction": direction}, seed
    )


def labelled(
    lm: LM, prompts: Pair, slopes: list[Tensor], method: str, settings: dict[str, Any], seed: int
) -> xr.Dataset:
    """Effect and null, as shares of the difference between the two runs. found: (kind, edge) of
    each example."""
    wires = wiring(lm)
    slope = torch.stack(slopes, dim=-1).float().cpu()  # kind, edge, example
    base = (
        prompts.corrupt_difference if prompts.direction == "denoise" else prompts.clean_difference
    )
    effect, null = (prompts.normalise(x + base) for x in slope)
    return dataset(
        {"effect": (("example", "edge"), effect.T), "null": (("example", "edge"), null.T)}
        | prompts.differences,
        method=method,
        provenance=lm.provenance,
        settings=settings,
        seed=seed,
        coords=prompts.coords | wires.coords(wires.edges),
        null_kind=NULL,
        notes=prompts.notes(null),
    )
