"""Answer every question by the choice that the model finds most likely after its context.

Paper: textbook (the multiple-choice scoring of lm-evaluation-harness)

    logprob[item, choice] = sum over the choice's tokens of log p(token | context, tokens before)

Tokens of a choice are those that follow the context's own in the two read together, with a space
between; where there is no context, the first token of the text is predicted from the beginning
token. normalise: "sum"; "tokens" and "characters" divide by the choice's length; "blind" takes
away what the choice has without its context.

Reads as: what the model prefers. Does not show that it could say it, nor that the context was read:
`benchmarks.controls` stands beside it. A tie counts as a share.
Cost: each context once, each choice once; `shared_prefix=False` runs every choice with its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from stratoscope.benchmarks._item import Item, checked, right
from stratoscope.benchmarks._resume import logprobs
from stratoscope.benchmarks._shared import Choice, Progress, cache_of, common, shared, silent, whole
from stratoscope.errors import InputError, SiteError
from stratoscope.models import longrope
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NORMALISE = ("sum", "tokens", "characters", "blind")
# relative, and nats: how close what shares a beginning must be to whole rows, to be believed
CLOSE, CLOSE_IN_HALF = (0.0, 1e-3), (0.02, 0.3)


@torch.no_grad()
def score(
    lm: LM,
    inputs: Any,
    *,
    normalise: str = "sum",
    shared_prefix: bool = True,
    batch_tokens: int = 4096,
    save: str | Path | None = None,
    progress: Progress = silent,
) -> xr.Dataset:
    """logprob, score (item, choice), NaN where an item has fewer choices; predicted, gold, right,
    margin (item).

    inputs: items. right: 1, 0, or a share of a tie. margin: the gold choice's score above the best
    other one's. The attribute `shared_prefix` says whether contexts were run once: a model without
    such a cache, or where it gives other numbers on the first items, is run on whole rows. save: a
    file that keeps what is finished, choices without contexts (normalise="blind") beside it in
    `blind_file(save)`; the same call goes on from there. Ctrl-C and errors lose no finished pass, a
    kill those of the last second. progress(done, all) counts choices, those of the files too.

    Raises SiteError for a model that does not predict the next token, InputError for what is no
    item and for text longer than the context, ResultError for a file of another question and one
    that cannot be written.
    """
    items = checked(inputs)
    if not lm.family.towers[""].causal or not lm.layout.head:
        raise SiteError(f"{lm.family.name} does not predict the next token: it cannot score text.")
    if normalise not in NORMALISE:
        raise InputError(f"normalise={normalise!r}: choose one of {', '.join(NORMALISE)}.")
    groups, count = [_choices(lm, item) for item in items], sum(len(i.choices) for i in items)
    share = shared_prefix and _can_share(lm, groups)
    total = 2 * count if normalise == "blind" else count
    logprob = _table(
        logprobs(lm, groups, share, save, batch_tokens, lambda done: progress(done, total))
    )
    scores = logprob
    if normalise == "tokens":
        scores = logprob / _table([[len(c.ids) - c.start for c in group] for group in groups])
    elif normalise == "characters":
        scores = logprob / _table([[len(choice) for choice in item.choices] for item in items])
    elif normalise == "blind":
        without = score(
            lm,
            [replace(item, context="") for item in items],
            shared_prefix=shared_prefix,
            batch_tokens=batch_tokens,
            save=blind_file(save),
            progress=lambda done, _: progress(count + done, total),
        )
        scores = logprob - without["logprob"].to_numpy()
    gold = np.array([item.gold for item in items])
    here = np.arange(len(items))
    others = scores.copy()
    others[here, gold] = -np.inf
    one = ("item",)
    return dataset(
        {
            "logprob": (("item", "choice"), logprob),
            "score": (("item", "choice"), scores),
            "predicted": (one, np.nanargmax(scores, axis=1)),
            "gold": (one, gold),
            "right": (one, right(scores, items)),
            "margin": (one, scores[here, gold] - np.nanmax(others, axis=1)),
        },
        method="benchmarks.likelihood",
        provenance=lm.provenance,
        settings={"normalise": normalise},
        coords={
            "id": (one, [item.id for item in items]),
            "group": (one, [item.group for item in items]),
            "text": (("item", "choice"), _texts(items)),
        },
        shared_prefix=str(share),
    )


def blind_file(save: str | Path | None) -> Path | None:
    """Where choices without their contexts stand, beside `save`."""
    return None if save is None else Path(f"{save}-blind")


def _choices(lm: LM, item: Item) -> list[Choice]:
    """The rows of an item as token ids."""
    if lm.tokenizer is None:
        raise InputError("items are texts: this model was loaded without a tokenizer.")
    between = "" if not item.context or item.context[-1].isspace() else " "
    rows = [f"{item.context}{between}{choice}" for choice in item.choices]
    batch = lm.batch(rows)
    ids = [row[:n] for row, n in zip(batch.text[0].tolist(), batch.lengths.tolist())]
    begin = lm.tokenizer.bos_token_id
    begin = lm.tokenizer.eos_token_id if begin is None else begin
    if not item.context:
        if begin is None:
            raise InputError(
                f"item {item.id!r} has no context, and this tokenizer no beginning or end token "
                "to predict its first token from."
            )
        return [Choice(row if row[0] == begin else [begin, *row], 1) for row in ids]
    start = int(lm.batch([item.context]).lengths[0])
    short = [choice for choice, row in zip(item.choices, ids) if len(row) <= start]
    if short:
        raise InputError(f"the choice {short[0]!r} of item {item.id!r} has no token of its own.")
    return [Choice(row, start) for row in ids]


def _can_share(lm: LM, groups: Sequence[Sequence[Choice]]) -> bool:
    """Whether keys and values of a beginning can be read again: tried on the shortest and the
    longest item."""
    longest = max(len(choice.ids) for group in groups for choice in group)
    window = getattr(lm.layout.config(), "sliding_window", None)
    alike = all(common(group) for group in groups)
    if lm.taps.listening or not alike or not lm.model.can_generate():
        return False
    if window and longest > window:  # padding would count in it
        return False
    turned = longrope.limit(lm.layout.config())
    if turned and longest > turned:  # keys of a beginning would be those of another text
        return False
    ends = sorted(groups, key=lambda group: max(len(choice.ids) for choice in group))
    tried = [ends[0], ends[-1]]
    out = lm.model(
        input_ids=torch.tensor([groups[0][0].ids[:1]], device=lm.model.device), use_cache=True
    )
    layers = getattr(cache_of(out), "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return False  # a recurrence keeps a state, not keys
    size = 2 * sum(len(choice.ids) for group in tried for choice in group)
    again, plain = (np.concatenate(run(lm, tried, size)) for run in (shared, whole))
    relative, absolute = CLOSE if lm.model.dtype == torch.float32 else CLOSE_IN_HALF
    return bool(np.allclose(again, plain, relative, absolute))


def _table(rows: Sequence[Sequence[float | int]]) -> np.ndarray:
    """(item, choice), NaN after a row's end."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _texts(items: Sequence[Item]) -> list[list[str]]:
    width = max(len(item.choices) for item in items)
    return [[*item.choices, *[""] * (width - len(item.choices))] for item in items]
