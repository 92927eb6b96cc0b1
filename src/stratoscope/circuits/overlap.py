"""Overlap: of the heads that matter most in one task, the share that matter most in another.

Paper: circuit-reuse

    importance[task, layer, head] = sum_example (d(clean; head's path) - d(clean)) /
        sum_example (d(corrupt) - d(clean))
    overlap = |largest_k(importance of one) & largest_k(importance of the other)| / k

d is the logit difference answer - foil at the last token. A head's path is its own write to the
input of the read-out, or to other receivers (`into`): there alone it has the value of the corrupt
run, as in `circuits.path_patching`; 1 means that it carries the whole difference between the two
prompts, below 0 that it speaks against the answer. Largest is by size, so both kinds count.

The authors' code lets the MLPs after a head answer to it on the way; here a path is an edge.

null_overlap: k heads drawn for each task from all heads alike (hypergeometric), mean k / heads.
Reads as: whether two tasks are answered through the same heads. Does not show that the heads do the
same in both, nor that the tasks have anything to do with each other: heads that write to the
read-out in any task are shared by all. Compare with a task of another kind.
Cost: a few passes of each prompt, and a read-out for each of its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from stratoscope.engine.edges import ends, exact
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import Pair, pair
from stratoscope.engine.sweep import Progress
from stratoscope.engine.wiring import Names, wiring
from stratoscope.errors import InputError
from stratoscope.maths import resample
from stratoscope.models.lm import LM
from stratoscope.results import dataset

AXES = {"task": "one of the two tasks that are compared: `inputs`, then `other`"}
Head = tuple[int, int]
DRAWS = 1000
NULL = "as many heads drawn for each task, from all heads alike"


class Carried(NamedTuple):
    """What the logit difference of each pair of prompts changes by along each head's path,
    (example, layer, head), and by when the whole prompt is changed, (example,)."""

    change: Float[np.ndarray, "example layer head"]
    gap: Float[np.ndarray, " example"]

    def importance(self, examples: Any = slice(None)) -> Float[np.ndarray, "layer head"]:
        """The share of the gap that each head's path carries, of these examples together."""
        return self.change[examples].sum(axis=0) / self.gap[examples].sum()


def strongest(score: Float[np.ndarray, "layer head"], k: int) -> list[Head]:
    """The k heads of the largest score by size, the largest first; of equals the earlier."""
    order = np.argsort(-np.abs(score).ravel(), kind="stable")[:k]
    return [divmod(int(n), score.shape[1]) for n in order]


def shared(
    one: Float[np.ndarray, "layer head"], other: Float[np.ndarray, "layer head"], k: int
) -> float:
    """The share of the k strongest heads of one that are among those of the other."""
    return len({*strongest(one, k)} & {*strongest(other, k)}) / k


def between(one: Carried, other: Carried, k: int, *, seed: int = 0) -> resample.Interval:
    """The overlap of two tasks, and its interval over the prompts of both, drawn again; NaN for
    fewer than 40 of either."""

    def again(some: np.ndarray, others: np.ndarray) -> float:
        return shared(one.importance(some), other.importance(others), k)

    return resample.percentile(again, *(range(len(task.gap)) for task in (one, other)), seed=seed)


def chance(heads: int, k: int, *, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, " draw"]:
    """The share that two random sets of k of these heads have in common, drawn many times."""
    return np.random.default_rng(seed).hypergeometric(k, heads - k, k, size=draws) / k


@torch.no_grad()
def carried(
    lm: LM,
    prompts: Pair,
    *,
    into: Names = "logits",
    advanced: Callable[[int], None] | None = None,
) -> Carried:
    """What each head's path to the logits, or to other receivers, carries alone: there it has the
    value of the source run. 0 where there is no path.

    prompts: as `engine.pair.pair` makes them; with direction "noise" the base run is the clean one.
    into: receivers by name, "L9H3.q", changed together. advanced: told how many paths were just
    done. Raises SiteError for a family without edges, InputError for an unknown receiver, or one
    that comes before all heads.
    """
    wires = wiring(lm)
    names = [f"L{layer}H{head}" for layer in range(wires.layers) for head in range(wires.heads)]
    [(senders, receivers)] = wires.paths([(names, into)])
    nothing = (), receivers  # no sender changes: the base run, among the same passes
    ways = [*(((sender,), receivers) for sender in senders), nothing]
    each = [
        torch.stack([exact(one, one.delta, ways, advanced=advanced) for one in rows]).sum(dim=0)
        for rows in ends(lm, prompts)
    ]
    differences = torch.stack(each).double().cpu().numpy()
    change = differences[:, :-1] - differences[:, -1:]
    gap = (prompts.corrupt_difference - prompts.clean_difference).double().numpy()
    noise = prompts.direction == "noise"
    return Carried(change.reshape(-1, wires.layers, wires.heads), gap if noise else -gap)


def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    other: Any,
    other_corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    other_answer: Words = None,
    other_foil: Words = None,
    k: int = 14,
    into: Names = "logits",
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Importance of every head in both tasks (task, layer, head), which are chosen, the overlap and
    its null (draw).

    inputs, corrupt, answer, foil: one task's prompts in pairs of equal token length, and what is
    asked; other, other_corrupt, other_answer, other_foil: the other task's, as many as you like.
    k: heads taken of each. into: where a head's path leads, "logits" or receivers such as
    ["L9H3.q"]. overlap_low, overlap_high: the 95 % interval over prompts of both tasks, drawn
    again; NaN for fewer than 40 of either. seed: of these draws and of the null. Raises SiteError
    for a family without edges; InputError for a k that is none, for pairs whose lengths differ or
    whose two runs give the same logit difference.
    """
    heads = lm.dims.layers * lm.dims.heads
    if not 1 <= k <= heads:
        raise InputError(f"k={k}: this model has {heads} heads; compare 1 to {heads} of them.")
    both = [
        pair(lm, inputs, corrupt, answer, foil, "noise"),
        pair(lm, other, other_corrupt, other_answer, other_foil, "noise"),
    ]
    total, done = (heads + 1) * sum(len(prompts.base) for prompts in both), 0

    def advanced(count: int) -> None:
        nonlocal done
        done = min(total, done + count)  # of a whole answer, each of its rows counts
        if progress:
            progress(done, total)

    tasks = [carried(lm, prompts, into=into, advanced=advanced) for prompts in both]
    found = [task.importance() for task in tasks]
    chosen = np.zeros((2, *found[0].shape), dtype=bool)
    for number, score in enumerate(found):
        chosen[number, *np.transpose(strongest(score, k))] = True
    spread = between(*tasks, k, seed=seed)
    return dataset(
        {
            "importance": (("task", "layer", "head"), found),
            "chosen": (("task", "layer", "head"), chosen),
            "overlap": ((), spread.value),
            "overlap_low": ((), spread.low),
            "overlap_high": ((), spread.high),
            "null_overlap": (("draw",), chance(heads, k, seed=seed)),
        },
        method="circuits.overlap",
        provenance=lm.provenance,
        settings={"k": k, "into": into},
        seed=seed,
        coords=both[0].coords
        | {
            "task": ["inputs", "other"],
            "layer": list(range(lm.dims.layers)),
            "head": list(range(lm.dims.heads)),
        },
        null_kind=NULL,
        notes=" ".join(filter(None, (prompts.notes() for prompts in both))),
    )
