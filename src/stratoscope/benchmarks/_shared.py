"""Log-probabilities of rows that begin alike: what they share is run once, and kept as keys and
values.

All choices of an item are token rows with one beginning. The beginnings of several items run
together, right-padded; then every row's rest reads the keys and values of its own beginning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.models.batch import right_padded
from stratoscope.models.lm import LM


@dataclass(frozen=True)
class Choice:
    """ids: of context and choice. start: where the choice begins, 1 or more."""

    ids: list[int]
    start: int


Group = Sequence[Choice]  # the choices of one item


Progress = Callable[[int, int], object]


def silent(done: int, total: int) -> None:
    """A progress that nobody sees."""


def whole(lm: LM, groups: Sequence[Group], size: int) -> list[list[float]]:
    """Every row run from its first token to its last: for models without such a cache."""
    rows = [choice for group in groups for choice in group]
    by_row: dict[int, float] = {}
    for part in _parts([len(row.ids) for row in rows], size):
        ids = [rows[i].ids for i in part]
        logits = lm(ids)["logits"]
        scores = torch.stack(
            [_scored(logits[n], ids[n], rows[i].start, len(ids[n])) for n, i in enumerate(part)]
        )
        by_row |= dict(zip(part, scores.tolist()))
    numbers = iter(range(len(rows)))
    return [[by_row[next(numbers)] for _ in group] for group in groups]


def shared(lm: LM, groups: Sequence[Group], size: int) -> list[list[float]]:
    """As `whole`, with what an item's rows share run once. size: tokens of one forward pass."""
    begin = [common(group) for group in groups]
    scores_of: list[list[float]] = [[] for _ in groups]
    widths = [n + sum(len(c.ids) - n for c in group) for n, group in zip(begin, groups)]
    for part in _parts(widths, size):
        some = _one_pass(lm, [groups[i] for i in part], [begin[i] for i in part])
        for i, scores in zip(part, some):
            scores_of[i] = scores
    return scores_of


def cache_of(out: Any) -> Any:
    """What a forward pass keeps of its keys and values, under either of Transformers' names."""
    return out["cache"] if "cache" in out else out.get("past_key_values")


def _one_pass(lm: LM, groups: Sequence[Group], begin: Sequence[int]) -> list[list[float]]:
    """begin: how many tokens the rows of each group share."""
    model: Any = lm.model
    takes = inspect.signature(model.forward).parameters
    device = model.device
    ids = right_padded([group[0].ids[:n] for group, n in zip(groups, begin)], 0).to(device)
    lengths = torch.tensor(begin, device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    first = min(min(c.start, n) for group, n in zip(groups, begin) for c in group) - 1
    keep = {"logits_to_keep": ids.shape[1] - first} if "logits_to_keep" in takes else {}
    out = model(input_ids=ids, attention_mask=mask.long(), use_cache=True, **keep)
    offset = first if keep else 0
    totals, rests = [], []
    for g, (group, n) in enumerate(zip(groups, begin)):
        for choice in group:
            end = min(n + 1, len(choice.ids))  # the first token of the rest is said here
            logits = out.logits[g, : end - 1 - offset]
            totals.append(_scored(logits, choice.ids, choice.start, end, offset))
            if len(choice.ids) > n + 1:
                rests.append((len(totals) - 1, g, choice.ids[n:], max(choice.start - n, 1)))
    scores = torch.stack(totals)
    if rests:
        at, which = (torch.tensor([rest[i] for rest in rests], device=device) for i in (0, 1))
        more = right_padded([rest[2][:-1] for rest in rests], 0).to(device)
        reals = torch.tensor([len(rest[2]) - 1 for rest in rests], device=device)
        there = torch.arange(more.shape[1], device=device) < reals[:, None]
        past = cache_of(out)
        past.batch_select_indices(which)
        place = lengths[which][:, None] + torch.arange(more.shape[1], device=device)
        logits = model(
            input_ids=more,
            attention_mask=torch.cat([mask[which], there], dim=1).long(),
            use_cache=True,
            **{"cache" if "cache" in takes else "past_key_values": past},
            **({"position_ids": place} if "position_ids" in takes else {}),
        ).logits
        sums = [_scored(logits[n], r[2], r[3], len(r[2])) for n, r in enumerate(rests)]
        scores = scores.index_add(0, at, torch.stack(sums))
    values = iter(scores.tolist())
    return [[next(values) for _ in group] for group in groups]


def _scored(
    logits: Float[Tensor, "position vocab"],
    ids: Sequence[int],
    start: int,
    end: int,
    offset: int = 0,
) -> Float[Tensor, ""]:
    """Sum of log p(ids[i] | before) for start <= i < end; row 0 of logits is position `offset`."""
    if end <= start:
        return logits.new_zeros((), dtype=torch.float32)
    here = logits[start - 1 - offset : end - 1 - offset].float()
    target: Int[Tensor, " position"] = torch.tensor(ids[start:end], device=here.device)
    return (here.gather(-1, target[:, None])[:, 0] - here.logsumexp(dim=-1)).sum()


def common(group: Group) -> int:
    """How many tokens all rows begin with alike."""
    columns = zip(*(choice.ids for choice in group))
    return sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, columns))


def _parts(widths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of rows of similar width, as many together as `size` tokens hold."""
    part: list[int] = []
    for i in sorted(range(len(widths)), key=widths.__getitem__):
        if part and (len(part) + 1) * widths[i] > size:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
