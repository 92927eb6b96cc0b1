"""Faithfulness of a circuit: run its edges alone, give all others another prompt's value, and see
how much remains.

Paper: textbook (Wang et al., 2022; Hanna et al., "Have Faith in Faithfulness", 2024)

    x_v = sum_u  (write_u in this run, if u -> v is in the circuit;  other_u, if not)       for
                                                                     every receiver v
    faithfulness = (d(circuit) - d(no edge)) / (d(every edge) - d(no edge))
    completeness = the same of all edges outside the circuit: 0 when nothing that matters was left
        out

d is the logit difference answer - foil at the last token. other_u is what u writes on the corrupt
prompt (ablation="resample": no edge is then the corrupt run itself) or its mean over all corrupt
prompts, position by position ("mean"). The query, key and value input of every query head is summed
for itself, also on grouped-query models; every edge together is the clean run.

null: circuits of as many edges that grow backwards from the logits at random.
Reads as: whether the circuit is enough, and whether it is all. Does not show that each of its edges
is needed, nor what it would do on prompts that were not asked; above 1 it lacks edges that work
against the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.circuits.graph import Circuit, first, growth, pairs
from stratoscope.engine import outside
from stratoscope.engine.alone import Layers
from stratoscope.engine.edges import Ends, ends
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import Pair, pair
from stratoscope.engine.sent import head_writes
from stratoscope.engine.wiring import SIDES, Wiring, wiring
from stratoscope.errors import InputError
from stratoscope.maths.resample import interval
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "circuits of as many edges that grow backwards from the logits at random"
Ablation = Literal["resample", "mean"]
_NUMBERS = 2**26  # that the writes of circuits run together may take


@torch.no_grad()
def run_circuits(
    layers: Layers,
    embed: Float[Tensor, "position dim"],
    other: Float[Tensor, "sender position dim"],
    keep: Bool[Tensor, "circuit receiver sender"],
) -> Float[Tensor, "circuit position dim"]:
    """What the read-out reads when every edge outside `keep` carries `other`, of each circuit: all
    of them go through each layer together. embed: what "embed" writes now."""
    lm = layers.lm
    wires = wiring(lm)
    # what a sender writes in each circuit's run, less `other`
    more = torch.zeros_like(other)[None].repeat(len(keep), 1, 1, 1)
    more[:, 0] = embed - other[0]

    def inputs(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The different inputs of some receivers of each circuit, (variant, position, dim), and
        (circuit, receiver) which is whose."""
        added, which, variants = [], [], 0
        for own, written in zip(rows[:, :, :count], more):
            kinds, index = torch.unique(own, dim=0, return_inverse=True)
            added.append(kinds.to(other) @ written[:count].flatten(1))
            which.append(index + variants)
            variants += len(kinds)
        sums = torch.cat(added).unflatten(1, other.shape[1:])
        return other[:count].sum(dim=0) + sums, torch.stack(which)

    width = 3 * wires.heads + 1
    each = torch.arange(wires.heads)
    for layer in range(wires.layers):
        first = wires.head(layer)
        mlp = first + wires.heads
        rows = keep[:, layer * width : (layer + 1) * width]
        x, which = inputs(rows[:, :-1], first)
        heads = layers.attention(layer, x)
        z = heads.z(*(getattr(heads, side)[which[:, n::3], each] for n, side in enumerate(SIDES)))
        for number, own in enumerate(z.transpose(1, 2)):
            written = head_writes(lm, layer, own, layers.outer)
            more[number, first:mlp] = written - other[first:mlp]
        x, which = inputs(rows[:, -1:], first if wires.parallel else mlp)
        more[:, mlp] = layers.mlp(layer, x)[which[:, 0]] - other[mlp]
    last, which = inputs(keep[:, -1:], len(other))
    return last[which[:, 0]].to(lm.model.dtype)


# shares(circuits) -> each circuit's share of the difference between every edge and none
Shares = Callable[[Bool[Tensor, "circuit receiver sender"]], Float[Tensor, " circuit"]]


def shares(lm: LM, prompts: Pair, ablation: Ablation) -> list[Shares]:
    """For each example, the function from circuits to faithfulness. Raises InputError when no edge
    and all agree."""
    if ablation not in ("resample", "mean"):
        raise InputError(
            f"ablation {ablation!r}: choose 'resample' (the corrupt prompt's writes) or 'mean'."
        )
    if ablation == "mean" and prompts.target.tokens:
        raise InputError(
            "ablation='mean' averages over prompts position by position, and after the prompts of "
            "whole answers different texts stand: use ablation='resample', or ask for one token."
        )
    every = list(ends(lm, prompts))
    if ablation == "resample":
        return [_share(rows, [one.source.writes for one in rows]) for rows in every]
    mean = _mean([one.source.writes for [one] in every])
    return [_share([one], [mean[:, : one.source.writes.shape[1]]]) for [one] in every]


def _share(rows: list[Ends], others: list[Tensor]) -> Shares:
    lm = rows[0].layers.lm
    mask = wiring(lm).mask

    @torch.no_grad()
    def differences(circuits: Tensor) -> Tensor:
        values = torch.zeros(len(circuits))
        for one, other in zip(rows, others):
            parts = []
            with one.layers:
                for some in circuits.split(max(1, _NUMBERS // other.numel())):
                    streams = run_circuits(one.layers, one.base.writes[0], other, some)
                    parts += [_difference(one, stream[None]) for stream in streams]
            values += torch.cat(parts).cpu()
        return values

    none, whole = differences(torch.stack([torch.zeros_like(mask), mask])).tolist()
    if abs(whole - none) < 1e-3:
        raise InputError(
            f"the logit difference is {whole:.3f} with every edge and {none:.3f} with none: there "
            "is nothing to be "
            f"faithful to. Change the corrupt prompts, or use ablation='resample'."
        )
    return lambda circuits: (differences(circuits) - none) / (whole - none)


def _difference(one: Ends, stream: Float[Tensor, "one=1 position dim"]) -> Tensor:
    return one.metric(outside.read_out(one.layers.lm, one.batch, stream, every=False)).float()


def _mean(writes: list[Tensor]) -> Float[Tensor, "sender position dim"]:
    """The mean of (sender, position, dim) of several lengths: position by position, over the
    prompts that have the position."""
    width = max(w.shape[1] for w in writes)
    padded = [torch.nn.functional.pad(w, (0, 0, 0, width - w.shape[1])) for w in writes]
    counts = sum(torch.arange(width, device=w.device) < w.shape[1] for w in writes)
    return sum(padded) / counts[:, None]


def as_mask(wires: Wiring, circuit: Circuit) -> Bool[Tensor, "receiver sender"]:
    """Which edges a circuit has. Raises InputError for a name or a pair that this model lacks."""
    keep = torch.zeros_like(wires.mask)
    for senders, receivers in wires.paths(pairs(circuit)):
        for receiver in receivers:
            keep[receiver, list(senders)] = True
    return keep & wires.mask


def random_circuits(
    wires: Wiring, size: int, draws: int, generator: torch.Generator
) -> Bool[Tensor, "draw receiver sender"]:
    """Circuits of `size` edges grown backwards from the logits in random order."""
    noise = torch.rand((draws, *wires.mask.shape), generator=generator)
    return torch.stack([first(wires, growth(wires, strength), size) for strength in noise])


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    circuit: Circuit | None = None,
    answer: Words = None,
    foil: Words = None,
    ablation: Ablation = "resample",
    draws: int = 3,
    seed: int = 0,
) -> xr.Dataset:
    """faithfulness, completeness (example) and null (example, draw); low, high: 95 % interval of
    mean faithfulness, NaN, with a note, for fewer than five examples.

    inputs, corrupt: prompts in pairs of equal token length. answer, foil: `metric.Whole` texts are
    scored with all their tokens (`engine.edges.ends`). circuit: pairs of names, or a result
    with an `edge` axis (`circuits.discover`); default every edge. draws: random circuits. Raises
    SiteError for a family without edges, InputError for an edge that the model lacks.
    """
    prompts = pair(lm, inputs, corrupt, answer, foil, "noise")
    wires = wiring(lm)
    keep = wires.mask if circuit is None else as_mask(wires, circuit)
    rivals = random_circuits(wires, int(keep.sum()), draws, torch.Generator().manual_seed(seed))
    circuits = torch.cat([torch.stack([keep, wires.mask & ~keep]), rivals])
    scores = torch.stack([share(circuits) for share in shares(lm, prompts, ablation)])
    spread = interval(scores[:, 0].double().numpy(), seed=seed)
    return dataset(
        {
            "faithfulness": (("example",), scores[:, 0]),
            "completeness": (("example",), scores[:, 1]),
            "null": (("example", "draw"), scores[:, 2:]),
            "low": ((), spread.low),
            "high": ((), spread.high),
        }
        | prompts.differences,
        method="circuits.faithfulness",
        provenance=lm.provenance,
        settings={"ablation": ablation, "draws": draws},
        seed=seed,
        coords=prompts.coords,
        edges=int(keep.sum()),
        of=int(wires.mask.sum()),
        null_kind=NULL,
        notes=" ".join(filter(None, [prompts.notes(), spread.note])),
    )
