"""Output nodes: the few heads and MLPs that, at the last token alone, carry the answer from the
clean prompt to the corrupt.

Paper: mcq-circuit-chinchilla

    direct[c]     = (N(write_c) . u in the clean run - the same in the corrupt run) / (d(clean) -
                  d(corrupt))
    recovered[k]  = (d(corrupt with c_0 .. c_k <- clean, at the last token) - d(corrupt)) /
                  (d(clean) - d(corrupt)),
                    the mean over prompts, each weighted by |d(clean) - d(corrupt)|

u = u_answer - u_foil, d the logit difference at the last token, N the final norm with its scale
held. All direct shares, with those of the embedding and of biases, sum to 1. The nodes c_0, c_1 ..
are those with the largest mean direct share; they are patched together. What a patched node feeds
later nodes counts as well; a node whose neighbours undo its work recovers less than it writes. A
pair whose clean difference is below its corrupt one is asked the question the other way round: it
counts, in both, by the share of its own way that is gone, and a note names it.

null: as many heads and MLPs drawn at random.
Reads as: how few components the last step of the answer goes through. Does not show how they know:
what they read at other tokens comes from the whole model. Direct shares see no soft-cap on logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.metric import Target, Words
from stratoscope.engine.pair import pair
from stratoscope.engine.sent import head_writes
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.engine.trace import Trace, capture
from stratoscope.engine.wiring import wiring
from stratoscope.engine.writes import final_norm
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.run import Each
from stratoscope.results import dataset

NULL = "as many heads and MLPs drawn at random"


def share(
    patched: Float[Tensor, "*cells example"],
    start: Float[Tensor, " example"],
    end: Float[Tensor, " example"],
) -> Float[Tensor, "*cells"]:
    """How far from start to end, 0 nothing, 1 all: the mean over examples, weighted by the length
    of their way.

    Summed with their signs, two ways that point in opposite directions would cancel in the
    denominator.
    """
    return gone(patched, start, end).sum(dim=-1) / (end - start).abs().sum()


def gone(
    patched: Float[Tensor, "*cells example"],
    start: Float[Tensor, " example"],
    end: Float[Tensor, " example"],
) -> Float[Tensor, "*cells example"]:
    """What each example went from start towards end, in logits: below 0 where it went away."""
    return (patched - start) * (end - start).sign()


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    nodes: int | Sequence[str] = 10,
    draws: int = 3,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """direct (example, component), recovered (rank,), null (draw, rank); `node` names each rank's.

    moved (example, rank) are the logits that each example came nearer to the clean difference;
    `resample.interval(moved[:, k], abs(clean_difference - corrupt_difference))` is recovered[k]
    with its interval over examples.

    inputs, corrupt: clean and corrupt prompts, pair by pair of equal token length. nodes: how many
    to take, or which ("L3H2", "L3 mlp"), in this order: those found on other prompts. draws: random
    orders of nodes for the null, 0 for none. sizes: at how many nodes these are patched too
    (default at each; NaN at others): most runs are the null's. Raises SiteError where the stream is
    no sum of writes or logits are not linear in it; InputError for an unknown node or number.
    """
    wires = wiring(lm)
    if len(lm.layout.head) != 1:
        raise SiteError(
            f"{lm.family.name}'s read-out has layers of its own, so logits are not linear in the "
            "writes."
        )
    names = wires.senders[1:]
    prompts = pair(
        lm,
        inputs,
        corrupt,
        answer,
        foil,
        single="what components write adds up to logits, not to log probabilities",
    )
    points = ["layers.*.attn.z", "layers.*.mlp.out", f"layers.{wires.layers - 1}.resid_post"]
    read = lm.readout.place(prompts.base)
    base, source = (
        capture(lm, batch, *points, positions=read) for batch in (prompts.base, prompts.source)
    )
    gap = prompts.clean_difference - prompts.corrupt_difference
    written = _direct(lm, source, prompts.target) - _direct(lm, base, prompts.target)
    direct = written.cpu() / gap[:, None]
    chosen = _chosen(nodes, names, direct.mean(dim=0))
    generator = np.random.default_rng(seed)
    rivals = [generator.permutation(len(names))[: len(chosen)].tolist() for _ in range(draws)]
    some = _sizes(sizes, len(chosen))
    cells = [
        _patch(source, [names[n] for n in order[:size]], read)
        for order, at in ((chosen, _sizes(None, len(chosen))), *((one, some) for one in rivals))
        for size in at
    ]
    patched = sweep(lm, prompts.base, cells, prompts.target.difference, progress=progress).cpu()
    ends = (prompts.corrupt_difference, prompts.clean_difference)
    shares = share(patched, *ends)
    null = torch.full((draws, len(chosen)), torch.nan)
    null[:, [size - 1 for size in some]] = shares[len(chosen) :].reshape(draws, len(some))
    return dataset(
        {
            "direct": (("example", "component"), direct),
            "recovered": (("rank",), shares[: len(chosen)]),
            "moved": (("example", "rank"), gone(patched[: len(chosen)], *ends).T),
            "null": (("draw", "rank"), null),
        }
        | prompts.differences,
        method="circuits.output_nodes",
        provenance=lm.provenance,
        settings={"nodes": nodes, "draws": draws, "sizes": some},
        seed=seed,
        coords=prompts.coords
        | {"component": names, "node": (("rank",), [names[n] for n in chosen])},
        null_kind=NULL,
        notes=prompts.notes(null),
    )


def _direct(lm: LM, seen: Trace, target: Target) -> Float[Tensor, "example component"]:
    """What every head and MLP writes straight towards answer - foil, in order of computation."""
    final = seen[f"layers.{lm.dims.layers - 1}.resid_post"]
    norm, unembed = final_norm(lm, final), lm.weight("logits").float()
    wide = replace(norm, scale=norm.scale[None])
    towards = unembed[target.answer] - unembed[target.foil]
    columns = []
    for layer in range(lm.dims.layers):
        # examples in the place of positions
        heads = head_writes(lm, layer, seen[f"layers.{layer}.attn.z"])
        writes = torch.cat([heads, seen[f"layers.{layer}.mlp.out"][None]]).float()
        columns.append(torch.einsum("ced,ed->ec", wide.linear(writes), towards))
    return torch.cat(columns, dim=1)


def _chosen(nodes: int | Sequence[str], names: list[str], strength: Tensor) -> list[int]:
    """The numbers of the nodes: the strongest, or those named."""
    if isinstance(nodes, int):
        if not 1 <= nodes <= len(names):
            raise InputError(
                f"nodes={nodes}: this model has {len(names)} heads and MLPs; choose 1 to "
                f"{len(names)}."
            )
        return strength.argsort(descending=True, stable=True)[:nodes].tolist()
    unknown = [name for name in nodes if name not in names]
    if unknown or not nodes:
        raise InputError(
            f"nodes {unknown or '[]'}: nodes here run {names[0]}, {names[1]} ... {names[-1]}."
        )
    return [names.index(name) for name in nodes]


def _sizes(sizes: Sequence[int] | None, count: int) -> list[int]:
    """At how many of the nodes the null is patched: at those, or at each."""
    every = range(1, count + 1)
    if wrong := [size for size in sizes or () if size not in every]:
        raise InputError(f"sizes {wrong}: the null is patched at 1 to {count} nodes.")
    return list(every if sizes is None else sizes)


def _patch(source: Trace, nodes: Sequence[str], read: int | Each) -> list[Intervention]:
    """The nodes' clean values where the answer is read; a layer's heads in one intervention."""
    heads: dict[int, list[int]] = {}
    changes = []
    for name in nodes:
        layer, _, head = name.removeprefix("L").partition("H")
        if head:
            heads.setdefault(int(layer), []).append(int(head))
        else:
            site = f"layers.{name.removeprefix('L').removesuffix(' mlp')}.mlp.out"
            changes.append(replaced(site, source[site][:, None], positions=read))
    for layer, units in heads.items():
        z = source[f"layers.{layer}.attn.z"]
        changes.append(
            replaced(f"layers.{layer}.attn.z", z[:, None, units], units=units, positions=read)
        )
    return changes
