"""Sweeps by gradient: an estimate of every cell for the price of two forward passes and one
backward pass.

    estimate[cell] = metric(base) + sum over the changed site  (changed - base) . d metric / d site

Paper: attribution patching (Nanda 2023; Kramár et al., "AtP*", 2024)

That is exact to first order only: where attention is saturated or the change is large it can miss
by any amount. So `screened` measures, with the exact sweep, the cells that the estimate puts on top
and a random sample of all cells, and reports how well the two agree on the sample. Weights take no
gradient, so frozen models work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import resolve_cells
from stratoscope.engine.metric import last_logits
from stratoscope.engine.sweep import Cell, Metric, Progress, sweep
from stratoscope.errors import InputError
from stratoscope.models.attention import softmax_visible
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


def estimate(lm: LM, inputs: Any, cells: Sequence[Cell], metric: Metric) -> Tensor:
    """First-order estimate of `sweep` on the same cells: (cell, example).

    Several changes in one cell are summed, as if each acted on the base run. A change of scores is
    followed exactly through the softmax, and estimated from the pattern on: a knock-out's score,
    minus infinity, is no small step. Raises InputError for an estimate that is no number.
    """
    batch = lm.batch(inputs)
    table = resolve_cells(lm, cells)
    sites = list({_felt(change.site): None for cell in table for change in cell})
    scores = [
        site
        for site in {change.site: None for cell in table for change in cell}
        if site.point == "attn.scores"
    ]
    examples = torch.arange(len(batch))
    base, values, slopes = gradients(
        lm, batch, [*sites, *scores], lambda logits: metric(logits, examples)
    )
    estimates = base.expand(len(table), -1).clone()
    for number, cell in enumerate(table):
        for change in cell:
            before, after = values[change.site], change.apply(values[change.site], Run(batch))
            if change.site.point == "attn.scores":
                before, after = softmax_visible(before), softmax_visible(after)
            estimates[number] += (
                ((after - before) * slopes[_felt(change.site)]).flatten(1).sum(dim=1)
            )
    wrong = (~estimates.isfinite().all(dim=1)).nonzero()[:, 0].tolist()  # the device waits once
    if wrong:
        raise InputError(
            f"the estimate is no number for cell {wrong[0]}, "
            f"{' and '.join(f'{c.operation} at {c.site}' for c in table[wrong[0]])}: "
            f"look at the value put there, or at a metric that divides by zero."
        )
    return estimates


def _felt(site: Site) -> Site:
    """Where a change is taken to be small."""
    return Site(site.tower, site.layer, "attn.pattern") if site.point == "attn.scores" else site


@dataclass(frozen=True)
class Screened:
    """estimate: (cell, example). exact: the same, NaN where it was not measured. sample: cells
    drawn at random, of all.

    correlation: Pearson's, between estimate and exact over the sample (and all examples); NaN when
    either is constant.
    """

    estimate: Tensor
    exact: Tensor
    sample: Tensor
    correlation: float


def screened(
    lm: LM,
    inputs: Any,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    top: int,
    sample: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Screened:
    """Estimate every cell; measure exactly the `top` whose estimate moves the metric most, and
    `sample` random ones.

    Raises InputError when more cells are asked for than there are.
    """
    if not (0 <= top <= len(cells) and 2 <= sample <= len(cells)):
        raise InputError(
            f"top={top} and sample={sample} of {len(cells)} cells: top 0 to all, sample 2 to all."
        )
    batch = lm.batch(inputs)
    guess = estimate(lm, batch, cells, metric)
    base = metric(last_logits(lm, batch), torch.arange(len(batch)))
    best = (guess - base).abs().amax(dim=1).topk(top).indices.cpu()
    drawn = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:sample]
    chosen = torch.cat([best, drawn]).unique()
    exact = torch.full_like(guess, torch.nan)
    exact[chosen] = sweep(lm, batch, [cells[i] for i in chosen.tolist()], metric, progress=progress)
    pair = torch.stack([guess[drawn].flatten(), exact[drawn].flatten()]).double()
    return Screened(guess, exact, drawn, float(torch.corrcoef(pair)[0, 1]))
