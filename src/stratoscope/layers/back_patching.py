"""Back-patching: a state from a later layer is put into an earlier one, at the same token, and the
model goes on from there.

Paper: back-patching

    margin[depth, layer] = m(run with resid_pre[layer, position] <- resid[depth, position] of the
        same prompt),  layer < depth
    m = logit(answer) - highest other logit, at the last token

depth counts the layers that the state has passed; layer is the one that now reads it, for a second
time or more. The answer is right where m > 0. A prompt that fails as it is and has some pair
(depth, layer) that is right was "hopping too late": the layers that could have finished the work
had passed. The paper tries two places, the end of the first hop's description and the last token;
call this once for each. It lets the model generate the answer; m asks for one token.

null: the same patches with the state of another prompt of the batch, at its own `position`, whose
answer is another one.
Reads as: whether the model could answer, had it more layers. Does not show that it would have with
training, and a search over hundreds of pairs finds some by chance: what counts is how many more
than the null.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def margin(
    logits: Float[Tensor, "row vocab"], answer: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """How far the answer's logit is above the best other one; above 0 the answer is what the model
    says."""
    ids = answer.to(logits.device)[:, None]
    others = logits.scatter(1, ids, -torch.inf).amax(dim=1)
    return logits.gather(1, ids)[:, 0] - others


def decoded_at(rank: Float[Tensor, "example depth"], top: int = 1) -> Float[Tensor, " example"]:
    """The first depth at which an entity is among the `top` tokens that the logit lens shows; NaN
    if it never is."""
    seen = rank < top
    return torch.where(seen.any(dim=1), seen.int().argmax(dim=1).double(), torch.nan).to(rank.dtype)


def strangers(answer: Sequence[int], seed: int) -> list[int] | None:
    """For each example another one, drawn among those with another answer where there are any; None
    for a single one."""
    if len(answer) < 2:
        return None
    generator, every = random.Random(seed), range(len(answer))
    pools = [
        [o for o in every if answer[o] != answer[e]] or [o for o in every if o != e] for e in every
    ]
    return [generator.choice(pool) for pool in pools]


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    position: int | Sequence[int] = -1,
    every: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """margin and null (example, depth, layer), NaN where layer >= depth; unpatched (example): the
    margin as it is.

    answer: the right one, one token; default the model's own. position: the token whose state
    moves, one for all prompts or one each; -1 is the last. every: only each such depth and layer.
    seed: of the null, which is NaN for a single prompt. Raises InputError for a position outside a
    prompt or a step that leaves no pair.
    """
    if not 1 <= every <= lm.dims.layers:
        raise InputError(f"every={every}: choose 1 to {lm.dims.layers}, the number of layers.")
    depths, layers = range(every, lm.dims.layers + 1, every), range(0, lm.dims.layers, every)
    batch = lm.batch(inputs)
    logits, one = last_logits(lm, batch), "the answer is to be the most likely next token"
    wanted = target(lm, batch, answer, single=one, logits=logits)
    given = [position] * len(batch) if isinstance(position, int) else list(position)
    places = torch.tensor(given)[:, None]
    states = capture(lm, batch, "layers.*.resid_post", positions=places).stack(
        "layers.*.resid_post"
    )
    others = strangers(wanted.answer.tolist(), seed)
    sources = [states] if others is None else [states, states[:, others]]
    pairs = [(depth, layer) for depth in depths for layer in layers if layer < depth]
    cells = [
        replaced(f"layers.{layer}.resid_pre", source[depth - 1], positions=places)
        for source in sources
        for depth, layer in pairs
    ]
    margins = sweep(
        lm,
        batch,
        cells,
        lambda logits, e: margin(logits, wanted.answer[e.cpu()]),
        progress=progress,
    )
    tables = torch.full((2, len(batch), len(depths), len(layers)), torch.nan)
    where = torch.tensor([(d // every - 1, layer // every) for d, layer in pairs]).T
    for table, values in zip(tables, margins.float().cpu().split(len(pairs))):
        table[:, where[0], where[1]] = values.T
    axes = ("example", "depth", "layer")
    return dataset(
        {
            "margin": (axes, tables[0]),
            "null": (axes, tables[1]),
            "unpatched": (("example",), margin(logits, wanted.answer)),
        },
        method="layers.back_patching",
        provenance=lm.provenance,
        settings={
            "position": given if isinstance(position, Sequence) else position,
            "every": every,
        },
        seed=seed,
        coords={
            "depth": list(depths),
            "layer": list(layers),
            "example_text": batch.coords()["example_text"],
            "answer": wanted.coords["answer"],
        },
        null_kind="the state of another prompt of the batch, at its own position",
        notes=" ".join(wanted.notes),
    )
