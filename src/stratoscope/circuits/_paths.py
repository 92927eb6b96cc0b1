"""Paths of values, told from the output back: what may be on one, where each part of it reads, and
which positions it brings to the output.

A part is ("head", layer, head), by its values alone, or ("mlp", layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.metric import tokens_of
from stratoscope.engine.trace import Trace
from stratoscope.engine.wiring import Wiring, wiring
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

Step = Sequence[Any]


def wires(lm: LM) -> Wiring:
    """Raises SiteError where the stream is no sum, or no position of it is read by one matrix."""
    found = wiring(lm)
    if not lm.readout.single or len(lm.layout.head) != 1:
        raise SiteError(
            f"what {type(lm.model).__name__} reads out is not linear in one position of its last "
            "stream, so an output has no vector there."
        )
    return found


def steps(path: Sequence[Step]) -> list[list[Any]]:
    """The parts of a path with plain numbers. Raises InputError for what is no part."""
    read = [list(step) for step in path]
    for step in read:
        if [*map(str, step[:1]), len(step)] not in (["head", 3], ["mlp", 2]):
            raise InputError(
                f"{step!r} in the path: write ('head', layer, head) or ('mlp', layer)."
            )
    return [[kind, *map(int, numbers)] for kind, *numbers in read]


def heard(wires: Wiring, path: Sequence[Step]) -> int:
    """How many layers have heads that the end of the path hears. Raises InputError for no path."""
    heads = mlps = wires.layers
    for step in path:
        kind, layer, *numbers = step
        limit = heads if kind == "head" else mlps
        if not 0 <= layer < limit or not all(0 <= head < wires.heads for head in numbers):
            raise InputError(
                f"{step!r} is not heard by what the path names before it, or does not exist: here "
                f"layers run from 0 to {limit - 1}, heads to {wires.heads - 1}, and a path is told "
                "from the output back."
            )
        mlps, heads = layer, layer + (kind == "mlp" and not wires.parallel)
    return heads


def ends(path: Sequence[Step]) -> list[str]:
    """What reads at each end of a path: the read-out, then every part of it."""
    return ["logits", *(f"L{n} mlp" if not h else f"L{n}H{h[0]}.v" for _, n, *h in path)]


def pairs(names: Sequence[str]) -> dict[str, Any]:
    """Coordinates of an `edge` axis: every ordered pair of names."""
    both = [(one, two) for one in names for two in names]
    return {
        "edge": [f"{one} -> {two}" for one, two in both],
        "sender": (("edge",), [one for one, _ in both]),
        "receiver": (("edge",), [two for _, two in both]),
    }


def reads(lm: LM, path: Sequence[Step]) -> str:
    """The site of the stream that the end of a path reads."""
    if not path:
        return f"layers.{lm.dims.layers - 1}.resid_post"
    middle = path[-1][0] == "mlp" and lm.family.towers[""].residual != "parallel"
    return f"layers.{path[-1][1]}.{'resid_mid' if middle else 'resid_pre'}"


def inside(path: Sequence[Step]) -> list[str]:
    """The sites that say what the path's heads attend to and give."""
    layers = [step[1] for step in path if step[0] == "head"]
    return [f"layers.{layer}.attn.{point}" for layer in layers for point in ("pattern", "z")]


def through(
    lm: LM, batch: Batch, path: Sequence[Step], seen: Trace, nothing: Tensor
) -> Float[Tensor, "example position"]:
    """How much of each position the path's heads bring to where the model is read."""
    share = nothing.scatter(1, lm.readout.positions(batch)[:, None].to(nothing.device), 1.0)
    for kind, layer, *head in path:
        if kind == "head":
            pattern = seen[f"layers.{layer}.attn.pattern"][:, head[0]].to(share)
            share = torch.einsum("eq,eqk->ek", share, pattern)
    return share


def output(lm: LM, name: str | int) -> int:
    """The number of an output that is named by token text, class or id."""
    if name in lm.readout.names:
        return lm.readout.names.index(name)
    ids = [name] if isinstance(name, int) else tokens_of(lm, name, "the observable's token")
    if len(ids) != 1 or not 0 <= ids[0] < lm.readout.size:
        raise InputError(
            f"{name!r} of the observable is {len(ids)} tokens, or none of this model's "
            f"{lm.readout.size} outputs: name one token each, with its space (' she'), or its id."
        )
    return ids[0]
