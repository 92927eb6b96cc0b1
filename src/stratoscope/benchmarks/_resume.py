"""What a scoring has finished, kept in a file, so that an interrupted one goes on where it stopped.

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
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from stratoscope.benchmarks import _shared
from stratoscope.benchmarks._shared import Group
from stratoscope.engine import resume
from stratoscope.errors import ResultError
from stratoscope.models.lm import LM

BETWEEN = 1.0  # seconds from one writing to the next; what is interrupted is written at once


def logprobs(
    lm: LM,
    groups: Sequence[Group],
    share: bool,
    save: str | Path | None,
    size: int,
    progress: Callable[[int], object],
) -> list[list[float]]:
    """Of every group's choices. share: whether beginnings are run once. progress: of the choices
    that are done."""
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
    return [[next(numbers) for _ in group] for group in groups]


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
