"""Positions as people say them (0, -1, a list, one list per example) turned into indices of
the tensor at hand.

Where keys lie side by side (scores and patterns, and `attn.k` and `attn.v` themselves), the tensor
of a later step of generation holds those of the cache too: a position of the prompt is still there,
until a sliding window lets it go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.run import Each, Run
from stratoscope.models.sites import Site

Positions = int | Each | Sequence[int] | Sequence[Sequence[int]] | Tensor | None


def run_at(site: Site, run: Run, word: str = "position") -> Run:
    """The run as positions at a site, or along one of its axes, see it: an encoder, and the keys of
    cross-attention, have the lengths of what the encoder reads; patches of a vision tower know
    nothing of text lengths and padding."""
    if site.source == word:
        there = None if run.batch is None else run.batch.source
    elif site.point == "projector":
        return Run(step=run.step, copies=run.copies)
    elif site.tower == "":
        return run
    else:
        there = None if run.batch is None else run.batch.read_by(site.tower)
    return Run(batch=there, step=run.step, copies=run.copies, padding=run.heard)


def key_axis(site: Site) -> int | None:
    """The axis along which the keys of the whole sequence lie, or None."""
    if site.point in ("attn.k", "attn.v", "cross.k", "cross.v"):
        return site.axes.index("position")
    return site.axes.index("key") if "key" in site.axes else None


def with_gone(x: Tensor, axis: int, count: int, fill: float) -> Tensor:
    """x with `count` places more at the beginning of an axis: the keys that a sliding window's
    cache has let go."""
    before = [0, 0] * (x.ndim - 1 - axis) + [count, 0]
    return torch.nn.functional.pad(x, before, value=fill)


def as_index(positions: Positions) -> Tensor:
    """Positions as integers, (k,) or (example, k). Raises InputError for anything else."""
    try:
        index = torch.as_tensor(positions)
        index = index[:, None] if isinstance(positions, Each) else index
    except (TypeError, ValueError):
        index = torch.empty(0, dtype=torch.float)
    if index.is_floating_point() or index.numel() == 0 or index.ndim > 2:
        raise InputError(
            f"positions {positions!r}: give an integer, a list, or one list of equal length for "
            "each example."
        )
    return index


def position_index(
    positions: Positions, run: Run, rows: int, width: int, among: Sequence[int] | None = None
) -> Tensor:
    """(row, k) indices along a padded axis of `width`. Negative positions count from an
    example's last real token.

    rows: of the tensor; those of one example are neighbours. Raises InputError for a position
    outside an example, and where padding is unknown; `among` says which rows are concerned (default
    all).
    """
    if positions is None:
        return torch.arange(width).expand(rows, width)
    index = as_index(positions)
    index = index.reshape(1, -1) if index.ndim < 2 else index
    if index.shape[0] not in (1, rows // run.copies):
        raise InputError(
            f"positions are given for {index.shape[0]} examples; the batch has "
            f"{rows // run.copies}."
        )
    index = (
        (index if index.shape[0] == 1 else index.repeat_interleave(run.copies, dim=0))
        .cpu()
        .expand(rows, -1)
    )
    if run.batch is None and run.padding is not None:
        run.padding.refuse_unknown()
    known = run.lengths
    if known is not None and len(known) != rows:
        raise InputError(
            f"positions are named for {len(known)} prompts, and the model runs {rows} rows: whose "
            "they are is unknown."
        )
    lengths = torch.full((rows,), width) if known is None else known
    resolved = torch.where(index < 0, index + lengths[:, None], index)
    wrong = (resolved < 0) | (resolved >= lengths[:, None])
    if among is not None:
        wrong[[row for row in range(rows) if row not in set(among)]] = False
    if wrong.any():
        row = int(wrong.any(dim=1).nonzero()[0])
        raise InputError(
            f"position {int(index[row][wrong[row]][0])} is outside example {row // run.copies}, "
            "which has "
            f"{int(lengths[row])} tokens (0 to {int(lengths[row]) - 1}, or -1 for the last)."
        )
    return resolved if run.start is None else resolved + run.start.cpu()[:, None]


def take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Keep `index` (example, k) along `axis` of x, whose first axis is the example."""
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[axis] = index.shape[1]
    full = (
        index.to(x.device)
        .reshape(shape)
        .expand(*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :])
    )
    return x.gather(axis, full)
