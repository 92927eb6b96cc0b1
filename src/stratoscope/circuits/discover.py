"""Discover a circuit: keep the edges that an attribution finds strongest, and see how good it is at
every size.

Paper: textbook (Conmy et al., "Towards Automated Circuit Discovery", 2023; Hanna et al., 2024)

    strength[edge] = | mean over examples of its attribution |                    (default
        circuits.edge_attribution_ig)
    keep="greedy"     grow backwards from the logits, always by the strongest edge into what
                      already reaches them
    keep="top"        the strongest edges, whatever they connect
    keep="threshold"  all edges at least as strong as `limit`

For circuits of growing size, in that order: faithfulness (1: as the whole model) and completeness
(0: nothing left outside), both of `circuits.faithfulness`, and minimality = mean over some of its
edges e of |faithfulness(C) - faithfulness(C without e)| (0: edges could go). What is returned is
pruned to edges on a path from embedding to logits.

null: the three curves of circuits chosen by the same rule with random strengths.
Reads as: a small part of the model that does the task on these prompts, and how small it can be.
Does not show that it is the only such part; and the same prompts choose and judge it: judge it on
others by `circuits.faithfulness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.circuits import edge_attribution_ig
from stratoscope.circuits.faithfulness import Ablation, Shares, shares
from stratoscope.circuits.graph import first, growth, prune, ranking
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair
from stratoscope.engine.wiring import Wiring, wiring
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "circuits chosen by the same rule with random strengths"
SIZES, DRAWS, PROBES, ENOUGH = 12, 2, 4, 0.1
_CURVES = ("faithfulness", "completeness", "minimality")


def judge(
    wires: Wiring,
    circuits: Sequence[Bool[Tensor, "receiver sender"]],
    share: list[Shares],
    generator: torch.Generator,
) -> Float[Tensor, "circuit curve=3"]:
    """Faithfulness, completeness and minimality of each circuit, means over examples; all circuits
    are run together."""
    groups = []
    for circuit in circuits:
        edges = circuit.nonzero()
        probed = edges[torch.randperm(len(edges), generator=generator)[:PROBES]]
        without = circuit.repeat(len(probed), 1, 1)
        without[torch.arange(len(probed)), probed[:, 0], probed[:, 1]] = False
        groups.append(torch.cat([torch.stack([circuit, wires.mask & ~circuit]), without]))
    scores = torch.stack([one(torch.cat(groups)) for one in share])  # example, circuit
    curves = []
    for own in scores.split([len(group) for group in groups], dim=1):
        minimal = (own[:, :1] - own[:, 2:]).abs().mean()
        curves.append(torch.stack([own[:, 0].mean(), own[:, 1].mean(), minimal]))
    return torch.stack(curves)


def strengths(wires: Wiring, attribution: xr.Dataset) -> Float[Tensor, "receiver sender"]:
    """|mean over examples| of an attribution of every edge. Raises InputError when its edges are
    not this model's."""
    expected = wires.coords(wires.edges)["edge"]
    if "effect" not in attribution or attribution["edge"].values.tolist() != expected:
        raise InputError(
            f"`attribution` must hold `effect` on all {len(expected)} edges of this model, as "
            f"circuits.edge_attribution gives it; got {dict(attribution.sizes)}."
        )
    strength = torch.zeros(wires.mask.shape)
    strength[wires.mask] = torch.from_numpy(attribution["effect"].mean("example").values).float()
    return strength


def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    keep: Literal["greedy", "top", "threshold"] = "greedy",
    limit: int | float | None = None,
    attribution: xr.Dataset | None = None,
    ablation: Ablation = "resample",
    seed: int = 0,
) -> xr.Dataset:
    """The circuit: effect (edge), strongest first, with sender and receiver; and the curves over
    size.

    faithfulness, completeness, minimality (step) with the coordinate size; null_* (step, draw).
    answer, foil: `metric.Whole` texts are scored with all their tokens (`engine.edges.ends`).
    limit: how many edges to keep, before pruning (for "threshold": the least strength); default the
    smallest size on the curve whose faithfulness is within 0.1 of 1. attribution: an attribution of
    every edge, made before. Raises SiteError for a family without edges, InputError for a missing
    threshold, a limit below one edge, or a foreign attribution.
    """
    rules: dict[str, Callable] = {"greedy": growth, "top": ranking, "threshold": ranking}
    if (
        keep not in rules
        or (keep == "threshold" and limit is None)
        or (limit is not None and limit <= 0)
    ):
        raise InputError(
            f"keep={keep!r}, limit={limit}: choose greedy or top, with `limit` edges or none "
            "given, or threshold with "
            f"`limit` the least strength; a limit is above 0."
        )
    prompts = pair(lm, inputs, corrupt, answer, foil, "noise")
    wires, generator = wiring(lm), torch.Generator().manual_seed(seed)
    if attribution is None:
        attribution = edge_attribution_ig.measure(
            lm, inputs, corrupt=corrupt, answer=answer, foil=foil, seed=seed
        )
    effect = strengths(wires, attribution)
    noise = torch.rand((DRAWS, *effect.shape), generator=generator)
    orders = [rules[keep](wires, strength) for strength in (effect.abs(), *noise)]
    sizes = np.unique(np.geomspace(1, len(wires.edges), SIZES).round().astype(int)).tolist()
    share = shares(lm, prompts, ablation)
    circuits = [first(wires, order, n) for n in sizes for order in orders]
    curves = judge(wires, circuits, share, generator).T.unflatten(1, (len(sizes), len(orders)))
    if keep == "threshold":
        size = int((effect[wires.mask].abs() >= float(limit or 0.0)).sum())
    else:
        size = _smallest(sizes, curves[0, :, 0]) if limit is None else int(limit)
    chosen = prune((wires.senders[s], wires.receivers[r]) for r, s in orders[0][:size].tolist())
    paths = sorted(
        wires.paths(chosen), key=lambda path: -float(effect[path[1][0], path[0][0]].abs())
    )
    return dataset(
        {"effect": (("edge",), torch.tensor([float(effect[r, s]) for (s,), (r,) in paths]))}
        | {name: (("step",), curve[:, 0]) for name, curve in zip(_CURVES, curves)}
        | {f"null_{name}": (("step", "draw"), curve[:, 1:]) for name, curve in zip(_CURVES, curves)}
        | prompts.differences,
        method="circuits.discover",
        provenance=lm.provenance,
        settings={
            "keep": keep,
            "limit": limit,
            "ablation": ablation,
            "attribution": attribution.attrs.get("method"),
        },
        seed=seed,
        coords=prompts.coords | wires.coords(paths) | {"size": (("step",), sizes)},
        of=len(wires.edges),
        null_kind=NULL,
        notes=prompts.notes(),
    )


def _smallest(sizes: list[int], faithfulness: Tensor) -> int:
    """The first size from which on the circuit is faithful enough; every edge at the latest."""
    good = [size for size, share in zip(sizes, faithfulness.tolist()) if abs(share - 1) <= ENOUGH]
    return good[0] if good else sizes[-1]
