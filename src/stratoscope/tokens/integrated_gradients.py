"""Integrated gradients: the logit difference shared out over the tokens, along the way from a blank
prompt to this one.

Paper: textbook (Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017; expected
gradients: Erion et al., "Improving Performance of Deep Learning Models with Axiomatic Attribution
Priors and Expected Gradients", 2021)

    attribution[position] = integral_0^1 rate[position](a) da
    rate[position](a)     = sum_dim (x - blank)[position, dim] * dF / dx[position, dim]  at  blank
                          + a (x - blank)

F is the logit difference answer - foil at the last token, x what enters layer 0, blank what would
enter it if every token's embedding were the baseline. Positions are the same at both ends, so they
count for nothing. Exactly, the attributions sum to F(x) - F(blank); `completeness_error` is by how
much they miss.

The way is rough in a trained model: F jumps wherever a large neuron or an attention sink switches
on, and evenly placed or Gauss-Legendre points miss that. The same sum rule holds on every stretch
of the way, which tells where points are missing; they are put there, for Simpson's rule.

Reads as: each token's share of the difference between this prompt and a blank one. Does not show
what removing one token does, and another baseline gives other shares. A zero baseline asks much of
a model with rotary positions: its first norm reads only direction, zero has none, and the way
starts with a jump where the gradient may not be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.entry import entry, evidence
from stratoscope.engine.estimate import announce
from stratoscope.engine.metric import Target, Words
from stratoscope.engine.sequence import slope, target
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens import _kinds

# points on the way (step,) -> F (step,) and rate (step, position), in float64
Way = Callable[
    [Float[Tensor, " step"]], tuple[Float[Tensor, " step"], Float[Tensor, "step position"]]
]
FIRST = 9  # points before any refinement: four stretches of three


def integrate(
    way: Way, steps: int, tolerance: float
) -> tuple[Float[Tensor, " position"], Float[Tensor, " step"], Float[Tensor, " step"]]:
    """The integral of the rate, and the points it took with their F; exact for a rate of degree 3.

    A stretch is two neighbouring intervals. Each round halves the quarter of the stretches whose
    integral misses F's rise most, until all misses together are below `tolerance` of the whole
    rise, or `steps` points are spent.
    """
    a = torch.linspace(0, 1, FIRST, dtype=torch.float64)
    value, rate = way(a)
    while True:
        width = a[2::2] - a[:-2:2]
        parts = width[:, None] / 6 * (rate[:-2:2] + 4 * rate[1::2] + rate[2::2])
        miss = (parts.sum(dim=1) - value[::2].diff()).abs()
        halved = min(max(1, len(width) // 4), (steps - len(a)) // 2)
        if halved < 1 or miss.sum() <= tolerance * (value[-1] - value[0]).abs():
            return parts.sum(dim=0), a, value
        worst = 2 * miss.topk(halved).indices
        new = torch.cat([(a[worst] + a[worst + 1]) / 2, (a[worst + 1] + a[worst + 2]) / 2])
        a, order = torch.cat([a, new]).sort()
        value, rate = (torch.cat(pair)[order] for pair in zip((value, rate), way(new)))


_NARROW = "Give fewer or shorter prompts; `gradient_times_input` takes two passes."


def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    steps: int = 129,
    tolerance: float = 0.01,
    baseline: str | int = "mean",
    draws: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> xr.Dataset:
    """attribution (example, position); logit_difference, baseline_difference, completeness_error,
    points (example).

    answer, foil: one for all examples or one each (default: as `target` chooses); `metric.Whole`
    texts are scored with all their tokens. steps: points of a way at most (9 or more), points:
    those it took, of all ways. tolerance: of completeness, as a share of the whole difference.
    baseline: "mean" (the mean embedding of the vocabulary), "zero", one token, as its text or id,
    or "kind" (expected gradients: the mean over `draws` ways, each from other words of the prompt's
    kinds, drawn by `seed`). batch_size: points in one pass. All in logits; NaN at padding and at
    image tokens. A note says where completeness is missed by more than a tenth. Raises SiteError
    for a model without token embeddings or vocabulary read-out, InputError for inputs without
    tokens, a bad option, or a baseline where the gradient is not finite.
    """
    if steps < FIRST or batch_size < 1 or draws < 1:
        settings = f"steps={steps}, draws={draws}, batch_size={batch_size}"
        raise InputError(f"{settings}: give at least {FIRST} steps, a draw and a batch size of 1.")
    batch = lm.batch(inputs)
    x, blank = entry(lm, batch, "mean" if baseline == "kind" else baseline)
    wanted = target(lm, batch, answer, foil)
    blanks = blank[None]
    if baseline == "kind":
        blanks = _kinds.entries(lm, batch, _kinds.words(lm, batch, draws, seed, wanted))
    # a point is a pass forward and, of twice its cost, one back
    announce(lm, batch, 3 * steps * len(blanks) * wanted.runs, "integrated gradients", _NARROW)
    attribution = torch.full(batch.mask.shape, torch.nan)
    ends = torch.zeros(3, len(batch))
    for e in range(len(batch)):  # each example needs its own points
        one = batch.example(e)
        n = one.ids.shape[1]
        from_each = (
            _way(lm, one, wanted.of([e]), x[e : e + 1, :n], b, batch_size)
            for b in blanks[:, e : e + 1, :n]
        )
        attribution[e, :n], ends[:, e] = _mean(
            [integrate(way, steps, tolerance) for way in from_each]
        )
    attribution[~evidence(batch).cpu()] = torch.nan
    rise = ends[0] - ends[1]
    error = attribution.nansum(dim=1) - rise
    return dataset(
        {
            "attribution": (("example", "position"), attribution),
            "logit_difference": (("example",), ends[0]),
            "baseline_difference": (("example",), ends[1]),
            "completeness_error": (("example",), error),
            "points": (("example",), ends[2].long()),
        },
        method="tokens.integrated_gradients",
        provenance=lm.provenance,
        settings={"steps": steps, "tolerance": tolerance, "baseline": baseline}
        | ({"draws": draws} if baseline == "kind" else {}),
        seed=seed,
        coords=batch.coords() | wanted.coords,
        notes=" ".join([*wanted.notes, *_missed(rise, error)]),
    )


def _mean(ways: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Over ways: the mean attribution, and of the metric at both ends, with the number of points in
    all."""
    ends = torch.stack([torch.stack([value[-1], value[0]]) for _, _, value in ways]).mean(dim=0)
    points = sum(len(points) for _, points, _ in ways)
    return torch.stack([total for total, _, _ in ways]).mean(dim=0), torch.cat(
        [ends, ends.new_tensor([points])]
    )


def _missed(rise: Tensor, error: Tensor) -> list[str]:
    """A note for each example whose attributions miss their sum by more than a tenth."""
    far = (error.abs() > 0.1 * rise.abs()).nonzero()[:, 0].tolist()
    problem = "the attributions miss their sum"
    return [
        f"Example {e}: {problem}, {rise[e]:.2f}, by {error[e]:.2f}; take more steps." for e in far
    ]


def _way(lm: LM, one: Batch, target: Target, x: Tensor, blank: Tensor, at_once: int) -> Way:
    """F and rate along the straight way from blank to x (1, position, dim), several points in one
    pass."""
    at_once = max(1, int(at_once / target.runs))

    def several(a: Tensor) -> tuple[Tensor, Tensor]:
        points = blank + a.to(x)[:, None, None] * (x - blank)
        n = len(a)
        value, gradient = slope(lm, _again(one, n), target.of([0] * n), start=points)
        if not gradient.isfinite().all():
            raise InputError(
                "the gradient on the way from the baseline is not finite: this model's first norm "
                "is singular at an "
                "entry of zero. Use baseline='mean'."
            )
        return value.double().cpu(), (gradient.double() * (x - blank).double()).sum(dim=-1).cpu()

    def way(a: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = zip(*map(several, a.split(at_once)))
        return torch.cat(value), torch.cat(rate)

    return way


def _again(one: Batch, times: int) -> Batch:
    """One example several times over."""
    extra = {name: torch.cat([value] * times) for name, value in one.extra.items()}
    return Batch(one.ids.repeat(times, 1), one.mask.repeat(times, 1), extra, one.tokens * times)
