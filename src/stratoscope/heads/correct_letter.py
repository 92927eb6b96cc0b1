"""Correct-letter heads: those that look at the right option of a multiple-choice question where the
model must say its letter.

Paper: mcq-circuit-chinchilla

    attention[head, option] = sum over tokens s of the option of pattern[head, last, s]
    picks[head]             = 1 where the right option has most attention, of m that share it 1 / m;
                              else 0

What an option is, its letter, its words or both, is said by whoever asks: the paper's heads look at
the letter. `heads` names those that pick the right one often, for `editing.drop_heads` or
`editing.low_rank_attention`: find them on some questions, change them on others.

null: the picks with the right place of another question, the mean over all pairs of questions. A
head that looks at the first option whatever is asked has as many, however often that one is right.
Reads as: which heads point at the answer before it is said. Does not show that the answer goes
through them (drop them, or `circuits.output_nodes`), nor that they understand the question: a head
that looks for one kind of word picks it wherever it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.maths import resample
from stratoscope.models import source
from stratoscope.models.lm import LM
from stratoscope.models.text import JOINED, joined
from stratoscope.results import dataset

AXES = {"option": "one of the choices that a question offers"}
NULL = "the picks with the right place of another question, the mean over all pairs of questions"

Head = tuple[int, int]


def picks(
    attention: Float[Tensor, "example *head option"],
) -> Float[Tensor, "example *head option"]:
    """1 at the option with most attention, 1 / m at each of m that share it, 0 elsewhere."""
    most = (attention == attention.amax(dim=-1, keepdim=True)).float()
    return most / most.sum(dim=-1, keepdim=True)


def exchanged(
    picked: Float[Tensor, "example *head option"], right: Int[Tensor, " example"]
) -> Float[Tensor, "*head"]:
    """The mean of picked[e, right of f] over all pairs of two questions e, f; NaN for fewer."""
    n = len(right)
    times = torch.bincount(right, minlength=picked.shape[-1]).to(picked)  # (option,)
    own = chosen(picked, right).sum(dim=0)
    return ((picked.sum(dim=0) * times).sum(dim=-1) - own) / (n * (n - 1) or torch.nan)


def chosen(
    table: Float[Tensor, "example *head option"], right: Int[Tensor, " example"]
) -> Float[Tensor, "example *head"]:  # noqa: F821
    """Each question's right option of a table."""
    return torch.stack([row[..., place] for row, place in zip(table, right.tolist())])


def heads(result: xr.Dataset, least: float = 0.5) -> list[Head]:
    """The (layer, head) that pick the right option in at least this share of the questions, and
    above their null by the whole 95 % interval; most picks first.

    found: as `measure` gives it, of five questions or more. Raises InputError for fewer.
    """
    if (n := result.sizes["example"]) < resample.FEWEST:
        raise InputError(f"{n} questions: {resample.FEWEST} tell a head that picks from chance.")
    share = result.picks.mean("example").values
    order = [divmod(int(k), share.shape[1]) for k in np.argsort(-share.ravel(), kind="stable")]
    return [
        (layer, head)
        for layer, head in order
        if share[layer, head] >= least
        and resample.interval(result.picks.values[:, layer, head], method="t").low
        > result.null.values[layer, head]
    ]


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, options: Sequence[Sequence[Any]], right: int | Sequence[int]
) -> xr.Dataset:
    """attention (example, layer, head, option) at the position that answers, picks (example, layer,
    head) of the right option, and null (layer, head), NaN for one question.

    options: for each prompt as many options, each a part of the prompt's text that stands there
    once ("C. orange"), or its token positions. right: which of them is right, one for each prompt
    or one for all. Raises InputError for an option that is not there or stands there twice;
    SiteError for a model whose attention cannot be seen.
    """
    lm.layout.resolve("layers.*.attn.pattern")
    source.refuse(lm, "options are sought in the prompt, and stand in what the encoder reads")
    batch = lm.batch(inputs)
    ids = batch.text[0]
    places = [right] * len(batch) if isinstance(right, int) else [int(place) for place in right]
    counts = {len(row) for row in options}
    if not len(options) == len(places) == len(batch) or len(counts) != 1 or min(counts) < 2:
        raise InputError(
            f"{len(batch)} prompts, options for {len(options)} ({sorted(counts)} each), and "
            f"{len(places)} right ones: give every prompt as many options, two or more, and one "
            "that is right."
        )
    count = counts.pop()
    if wrong := [place for place in places if not 0 <= place < count]:
        raise InputError(f"right={wrong[0]}: there are {count} options, 0 to {count - 1}.")
    member = torch.zeros(len(batch), count, ids.shape[1])
    for example, row in enumerate(options):
        for number, option in enumerate(row):
            member[example, number, _positions(batch.tokens[example], option, batch.words)] = 1
    site = "layers.*.attn.pattern"
    pattern = capture(lm, batch, site, positions=lm.readout.place(batch)).stack(site).float()
    # (layer, example, head, 1, key): one position is asked at
    pattern = pattern.reshape(*pattern.shape[:3], -1)
    attention = torch.einsum("lehk,eok->elho", pattern, member.to(pattern)).cpu()
    target, picked = torch.tensor(places), picks(attention)
    axes = ("example", "layer", "head")
    return dataset(
        {
            "attention": ((*axes, "option"), attention),
            "picks": (axes, chosen(picked, target)),
            "null": (axes[1:], exchanged(picked, target)),
        },
        method="heads.correct_letter",
        provenance=lm.provenance,
        coords={
            "layer": list(range(attention.shape[1])),
            "head": list(range(attention.shape[2])),
            "right": (("example",), places),
            "example_text": batch.coords()["example_text"],
        },
        null_kind=NULL,
    )


def _positions(tokens: Sequence[str], option: str | Sequence[int], words: bool) -> list[int]:
    """Where an option's tokens stand in one prompt; a token that holds any of it counts."""
    if not isinstance(option, str):
        places = [place + len(tokens) if place < 0 else int(place) for place in option]
        if not places or not all(0 <= place < len(tokens) for place in places):
            raise InputError(
                f"option {list(option)}: give positions of a prompt of {len(tokens)} tokens."
            )
        return places
    text = joined(tokens, words=words)
    if not option or (times := text.count(option)) != 1:
        raise InputError(
            f"option {option!r} stands {times if option else 0} times in {text!r:.200}: give a "
            "part that stands there once (the letter with its words), or token positions."
        )
    start, begin, places = text.index(option), 0, []
    for place, token in enumerate(tokens):
        end = len(joined(tokens[: place + 1], words=words))
        # the rest of a sign that the token before shows
        held = token == JOINED and places[-1:] == [place - 1]
        if held or (begin < start + len(option) and end > start):
            places.append(place)
        begin = end
    return places
