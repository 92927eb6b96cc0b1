"""Score as `benchmarks.likelihood` does, keep what is finished in a file, and go on from there.

scores = benchmarks.resume.score(lm, items, save="scores.part")     # the same again after Ctrl-C

The file holds the log-probability of every choice, NaN where there is none yet, and a fingerprint
of the question: weights and what changes them, dtype, kernel, device, versions, the tokens of every
choice, and how they are run. A pass holds the same rows whether anything was interrupted or not, so
that the result is the unbroken one's to the bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stratoscope.benchmarks import _shared, likelihood
from stratoscope.benchmarks._item import Item, checked, right
from stratoscope.benchmarks._shared import Choice, Group, Progress, silent
from stratoscope.engine import resume
from stratoscope.errors import InputError, ResultError, SiteError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

BETWEEN = 1.0  # seconds from one writing to the next; what is interrupted is written at once


@torch.no_grad()
def score(
    lm: LM,
    inputs: Any,
    *,
    save: str | Path | None = None,
    normalise: str = "sum",
    shared_prefix: bool = True,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> xr.Dataset:
    """What `benchmarks.likelihood.score` gives, to the bit; with "blind" both halves are run with
    these settings.

    save: the file, or None to keep nothing; choices without their contexts (normalise="blind") have
    one of their own, `blind(save)`. Ctrl-C and errors lose no finished pass, a kill those of the
    last second. progress(done, all) counts choices, those of the files too. Raises ResultError for
    a file of another question and one that cannot be written, and what
    `benchmarks.likelihood.score` raises.
    """
    items = checked(inputs)
    if not lm.family.towers[""].causal or not lm.layout.head:
        raise SiteError(f"{lm.family.name} does not predict the next token: it cannot score text.")
    if normalise not in likelihood.NORMALISE:
        raise InputError(
            f"normalise={normalise!r}: choose one of {', '.join(likelihood.NORMALISE)}."
        )
    run = partial(_logprobs, lm, shared_prefix=shared_prefix, size=batch_tokens)
    groups, count = _groups(lm, items), sum(len(item.choices) for item in items)
    total = 2 * count if normalise == "blind" else count
    logprob, share = run(groups, save, progress=lambda done: progress(done, total))
    scores = logprob
    if normalise == "blind":
        bare = _groups(lm, [replace(item, context="") for item in items])
        without, _ = run(bare, blind(save), progress=lambda done: progress(count + done, total))
        scores = logprob - without
    elif normalise == "tokens":
        scores = logprob / likelihood._table([[len(c.ids) - c.start for c in g] for g in groups])
    elif normalise == "characters":
        scores = logprob / likelihood._table([[len(c) for c in item.choices] for item in items])
    return _labelled(lm, items, logprob, scores, {"normalise": normalise}, share)


def blind(save: str | Path | None) -> Path | None:
    """The file of the same choices without their contexts, beside `save`."""
    return None if save is None else Path(f"{save}-blind")


def _logprobs(
    lm: LM,
    groups: Sequence[Group],
    save: str | Path | None,
    *,
    shared_prefix: bool,
    size: int,
    progress: Callable[[int], object],
) -> tuple[np.ndarray, bool]:
    """(item, choice), NaN after an item's last; and whether contexts were run once. progress: of
    the choices that are done."""
    share = shared_prefix and likelihood._can_share(lm, groups)
    runs = groups if share else [[choice] for group in groups for choice in group]
    ends = [0, *accumulate(map(len, runs))]  # run i has the numbers from ends[i] to ends[i + 1]
    key = "" if save is None else _fingerprint(lm, groups, share, size)
    values = None if save is None else _read(Path(save), key, ends[-1])
    if values is None:
        values = torch.full((ends[-1],), torch.nan, dtype=torch.float64)
    else:
        progress(int((~values.isnan()).sum()))
    written, fresh = time.monotonic(), False
    try:
        for part in _shared._parts(_widths(runs, share), size):
            where = [number for i in part for number in range(ends[i], ends[i + 1])]
            if not values[where].isnan().any():
                continue
            scored = (_shared.shared if share else _shared.whole)(lm, [runs[i] for i in part], size)
            fresh = True
            values[where] = torch.tensor([x for row in scored for x in row], dtype=torch.float64)
            if save is not None and time.monotonic() - written > BETWEEN:
                resume.write(Path(save), key, values)
                written, fresh = time.monotonic(), False
            progress(int((~values.isnan()).sum()))
    finally:
        if save is not None and fresh:
            resume.write(Path(save), key, values)
    numbers = iter(values.tolist())
    return likelihood._table([[next(numbers) for _ in group] for group in groups]), share


def _groups(lm: LM, items: Sequence[Item]) -> list[list[Choice]]:
    return [likelihood._choices(lm, item) for item in items]


def _widths(runs: Sequence[Group], share: bool) -> list[int]:
    """How many tokens a run needs: a beginning once and the rests, or a whole row."""
    begin = [_shared.common(group) if share else 0 for group in runs]
    return [n + sum(len(c.ids) - n for c in group) for n, group in zip(begin, runs)]


def _fingerprint(lm: LM, groups: Sequence[Group], share: bool, size: int) -> str:
    """Of all that a log-probability comes from; where the model was loaded from is left out."""
    origin = {name: x for name, x in lm.provenance.items() if name not in ("model", "title")}
    rows = [[(choice.ids, choice.start) for choice in group] for group in groups]
    question = json.dumps([origin, rows, bool(share), size], sort_keys=True, default=str)
    return hashlib.sha256(question.encode()).hexdigest()


def _read(save: Path, key: str, count: int) -> Tensor | None:
    try:
        return resume.read(save, key, (count,))
    except ResultError as error:
        raise ResultError(
            f"{save} does not hold the beginning of these scores, but of others (other weights, "
            "edits, items, settings or versions), or something else: repeat what it was begun "
            "with, give another path, or delete it."
        ) from error


def _labelled(
    lm: LM,
    items: Sequence[Item],
    logprob: np.ndarray,
    scores: np.ndarray,
    settings: dict[str, Any],
    share: bool,
) -> xr.Dataset:
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
        settings=settings,
        coords={
            "id": (one, [item.id for item in items]),
            "group": (one, [item.group for item in items]),
            "text": (("item", "choice"), likelihood._texts(items)),
        },
        shared_prefix=str(share),
    )
