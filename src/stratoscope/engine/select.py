"""Positions as people say them (0, -1, a list, one list per example) turned into indices of the tensor at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run

Positions = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None


def run_at(site: Site, run: Run) -> Run:
    """The run as positions at a site see it: patches of a vision tower know nothing of text lengths and padding."""
    return run if site.tower == "" and site.point != "projector" else Run(step=run.step)


def as_index(positions: Positions) -> Tensor:
    """Positions as integers, (k,) or (example, k). Raises InputError for anything else."""
    try:
        index = torch.as_tensor(positions)
    except (TypeError, ValueError):
        index = torch.empty(0, dtype=torch.float)
    if index.is_floating_point() or index.numel() == 0 or index.ndim > 2:
        raise InputError(
            f"positions {positions!r}: give an integer, a list, or one list of equal length for each example."
        )
    return index


def position_index(
    positions: Positions, run: Run, examples: int, width: int, among: Sequence[int] | None = None
) -> Tensor:
    """(example, k) indices along a padded axis of `width`. Negative positions count from an example's last real token.

    Raises InputError for a position outside an example; `among` says which examples are concerned (default all).
    """
    if positions is None:
        return torch.arange(width).expand(examples, width)
    index = as_index(positions)
    index = index.reshape(1, -1) if index.ndim < 2 else index
    if index.shape[0] not in (1, examples):
        raise InputError(f"positions are given for {index.shape[0]} examples; the batch has {examples}.")
    index = index.cpu().expand(examples, -1)
    batch = run.batch
    known = batch is not None and batch.mask is not None and len(batch) == examples
    lengths = batch.lengths.cpu() if known else torch.full((examples,), width)
    resolved = torch.where(index < 0, index + lengths[:, None], index)
    wrong = (resolved < 0) | (resolved >= lengths[:, None])
    if among is not None:
        wrong[[e for e in range(examples) if e not in set(among)]] = False
    if wrong.any():
        example = int(wrong.any(dim=1).nonzero()[0])
        raise InputError(
            f"position {int(index[example][wrong[example]][0])} is outside example {example}, which has "
            f"{int(lengths[example])} tokens (0 to {int(lengths[example]) - 1}, or -1 for the last)."
        )
    return resolved if run.shift is None else resolved + run.shift.cpu()[:, None]


def take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Keep `index` (example, k) along `axis` of x, whose first axis is the example."""
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[axis] = index.shape[1]
    full = index.to(x.device).reshape(shape).expand(*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :])
    return x.gather(axis, full)
