"""Channel search: which few directions that one head writes, made louder or silent at the last
token, let a model say more right answers, found on some prompts and judged on others.

Paper: talking-heads

    w[head]  = O z[last, head]                       what the head writes at the last token
    cell     = attn.out[layer][last] + (factor - 1) U U^T w[head]
    U        = the first `components` left singular vectors of the head's W_OV  (heads.composition)

Each of `heads`, times each number of components, times each factor is tried on the first `search`
prompts. The one after which most answers are the model's next token, and of equals the one with the
largest mean margin (logit of the answer less the highest other), is then judged on the rest.

null: so many times U is instead as many random directions that the same head can write, and the
whole search is made again and judged alike: the best of many that were tried gains on what it was
chosen for, so that a found channel must gain more than a found random one.
Reads as: which channel the answers hang on, and by how much. Does not show what the channel says,
nor that the gain lasts on another task; what stands at earlier tokens is left alone (to write the
scaling into the weights, at every token: `heads.composition.edit`).
Cost: heads x components x factors x (draws + 1) cells of a sweep over `search` prompts, from the
last token on; all heads of a model are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.intervene import Intervention, add
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.engine.select import Positions
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.heads import composition
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "mean gain of random directions that the same heads write, searched and judged alike"
AXES = {
    "tried": "a channel that was tried: so many components of a head, times a factor",
    "judged": "a prompt that a channel was judged on, and not searched with",
}
Head = tuple[int, int]
Basis = dict[Head, Tensor]  # (dim, rank)


class Channel(NamedTuple):
    """The first so many components of what a head writes, times a factor."""

    layer: int
    head: int
    components: int
    factor: float


def margin(
    logits: Float[Tensor, "row vocab"], answer: Float[Tensor, " row"] | Tensor
) -> Float[Tensor, " row"]:
    """Logit of each row's answer less the highest other one: above 0 where it is said next."""
    own = answer.to(logits.device)[:, None]
    rest = logits.scatter(1, own, -torch.inf).max(dim=1).values
    return logits.gather(1, own)[:, 0] - rest


def first(margins: Float[Tensor, "tried example"]) -> int:
    """The channel after which most margins are above 0; of equals the one with the largest mean,
    of these the earlier."""
    right, mean = (margins > 0).sum(dim=1).tolist(), margins.mean(dim=1).tolist()
    return max(range(len(right)), key=lambda n: (right[n], mean[n], -n))


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    heads: Sequence[Sequence[int]] | None = None,
    components: Sequence[int] = (1, 3),
    factors: Sequence[float] = (0.0, 2.0, 4.0),
    search: int | None = None,
    draws: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """right and margin of every channel on the prompts searched with, (tried,), and which is best,
    a number of them; then right, gain and margin_gain of that one on the others, (judged,): what it
    adds to 0 or 1 for a right answer, and to the margin. null and null_margin_gain (draw,).

    answer: one for all prompts or one each, one token; default what the model says, which a channel
    can then only spoil. heads: as (layer, head), such as `editing.drop_heads.strongest` gives of an
    effect; default all. search: how many prompts, the first ones, are searched with; default half.
    seed: of the random directions. Raises InputError for fewer than two prompts, or a head, a
    number of components or of prompts that is not there; SiteError where a head's write is no part
    of a sum, and as `heads.composition` does.
    """
    o, v = _matrices(lm)
    batch = lm.batch(inputs)
    wanted = target(lm, batch, answer, single="whether the answer is the next token is judged")
    count = len(batch) // 2 if search is None else search
    chosen = _heads(o, heads)
    tried = [Channel(*h, c, float(f)) for h in chosen for c in components for f in factors]
    _check(len(batch), count, o.shape[-1], components, draws, tried)
    own = {h: composition.svd_of_product(o[h], v[h])[0] for h in chosen}
    generator = torch.Generator().manual_seed(seed)
    bases = [own, *(_random(own, max(components), generator) for _ in range(draws))]
    read = lm.readout.place(batch)
    z = capture(lm, batch, "layers.*.attn.z", positions=read).stack("layers.*.attn.z").float()

    def score(logits: Tensor, example: Tensor) -> Tensor:
        return margin(logits, wanted.answer[example.cpu()])

    here, there = range(count), range(count, len(batch))
    cells = [_turned(z, o, u, channel, read, here) for u in bases for channel in tried]
    searched = sweep(lm, batch, cells, score, progress=progress)[:, :count]
    searched = searched.unflatten(0, (len(bases), len(tried))).cpu()
    best = [first(margins) for margins in searched]
    cells = [_turned(z, o, u, tried[n], read, there) for u, n in zip(bases, best)]
    after = sweep(lm, batch, cells, score)[:, count:].float().cpu()
    plain = margin(last_logits(lm, batch), wanted.answer)[count:].float().cpu()
    gain = (after > 0).float() - (plain > 0).float()
    text = batch.coords()["example_text"][1]
    return dataset(
        {
            "right": (("tried",), (searched[0] > 0).float().mean(dim=1)),
            "margin": (("tried",), searched[0].mean(dim=1)),
            "best": ((), best[0]),
            "plain": (("judged",), (plain > 0).float()),
            "gain": (("judged",), gain[0]),
            "margin_gain": (("judged",), after[0] - plain),
            "null": (("draw",), gain[1:].mean(dim=1)),
            "null_margin_gain": (("draw",), (after[1:] - plain).mean(dim=1)),
            "null_best": (("draw",), best[1:]),
        },
        method="heads.channel_search",
        provenance=lm.provenance,
        settings={"search": count, "draws": draws},
        seed=seed,
        coords={
            **{n: (("tried",), list(column)) for n, column in zip(Channel._fields, zip(*tried))},
            "judged_text": (("judged",), list(text[count:])),
        },
        null_kind=NULL,
        notes=" ".join(wanted.notes),
    )


def _matrices(lm: LM) -> tuple[Tensor, Tensor]:
    """O and V of every head. Raises SiteError where no part of what one writes can be scaled."""
    if not lm.dims.vocab or lm.readout.kind != "vocab":
        raise SiteError(f"{lm.family.name} has no vocabulary read-out: it has no answers to say.")
    o, v = composition.writes(lm), composition.reads(lm)[2]
    for site in lm.layout.resolve("layers.*.attn.out"):
        if lm.layout.writers(site)[1:]:
            raise SiteError(
                f"{lm.family.name} norms what its heads write together: no component can be scaled "
                "alone."
            )
    return o, v


def _turned(
    z: Float[Tensor, "layer example head head_dim"],
    o: Float[Tensor, "layer head dim head_dim"],
    basis: Basis,
    channel: Channel,
    read: Positions,
    examples: range,
) -> Intervention:
    layer, head, count, factor = channel
    directions = basis[layer, head][:, :count]
    written = z[layer, examples.start : examples.stop, head] @ o[layer, head].T
    change = (factor - 1) * (written @ directions) @ directions.T
    where = {"positions": read, "examples": list(examples)}
    return add(f"layers.{layer}.attn.out", change[:, None], **where)


def _random(own: Basis, rank: int, generator: torch.Generator) -> Basis:
    """Random orthonormal directions among those that each head can write."""
    return {
        head: torch.linalg.qr(u @ torch.randn(u.shape[1], rank, generator=generator).to(u)).Q
        for head, u in own.items()
    }


def _heads(o: Tensor, heads: Sequence[Sequence[int]] | None) -> list[Head]:
    layers, number = o.shape[:2]
    every = [(layer, head) for layer in range(layers) for head in range(number)]
    given = every if heads is None else [tuple(head) for head in heads]
    if strange := [head for head in given if head not in every]:
        raise InputError(
            f"head {strange[0]}: heads are (layer, head), 0 to {layers - 1} and {number - 1}."
        )
    return given  # type: ignore[return-value]


def _check(
    prompts: int, search: int, rank: int, components: Sequence[int], draws: int, tried: Sequence
) -> None:
    if not 1 <= search < prompts:
        raise InputError(
            f"search={search} of {prompts} prompts: search with one at least, and leave one to "
            "judge."
        )
    if not tried or not all(1 <= c <= rank for c in components):
        raise InputError(
            f"components={list(components)}: give heads, factors and numbers of components from 1 "
            f"to {rank}."
        )
    if draws < 1:
        raise InputError(f"draws={draws}: the null needs at least one.")
