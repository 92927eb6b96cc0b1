"""Similarity: how alike two sets of representations of the same samples are, layer by layer: CKA
and RSA.

Paper: human-cat-cka

    cka = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))        K, L: kernels between samples, linear or
                                                          Gaussian (rbf)
    rsa = rank correlation of the distances between samples in the one and in the other

HSIC is the estimate of Song et al. (2012), whose mean is 0 for unrelated samples (debiased); the
usual one grows with the number of features. The Gaussian's width is half the median distance. None
of them changes when a space is rotated, mirrored, scaled or moved.

interval: of 95 %, by the jackknife: the samples are dealt into groups, each group is left out once,
and what that changes is one value of `maths.resample.interval` (Arvesen 1969, for U-statistics, of
which HSIC is one). A bootstrap would put the same sample twice into a kernel, which looks like
likeness, and no sample is used twice here.
null: the same after the other's samples are shuffled, the mean of `SHUFFLES` orders; null_high:
what unrelated samples exceed, in size, in 5 % of cases (`maths.resample.bound`).
Reads as: whether the same samples lie near each other in both. Does not show that the same features
are there: linear cka is led by the few directions of largest variance, and is high when those alone
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.embeddings import relative_representations
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.maths.resample import FEWEST, bound, interval
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "the same after the other's samples are shuffled"
SHUFFLES = 99
Samples = Float[np.ndarray, "sample feature"]
Kernel = Float[np.ndarray, "sample sample"]
LEAST = 4  # samples: with fewer, the debiased HSIC has no meaning


def linear(x: Samples) -> Kernel:
    """Inner products of the centred samples."""
    moved = np.asarray(x, dtype=np.float64) - np.mean(x, axis=0, dtype=np.float64)
    return moved @ moved.T


def distances(x: Samples) -> Kernel:
    """Euclidean distances between samples; what is below a millionth of the largest is rounding,
    and 0."""
    k = linear(x)
    squared = np.maximum(np.diag(k)[:, None] + np.diag(k) - 2 * k, 0.0)
    return np.sqrt(np.where(squared > 1e-12 * squared.max(), squared, 0.0))


def rbf(x: Samples, width: float = 0.5) -> Kernel:
    """Gaussian kernel; its deviation is `width` times the median distance."""
    d = distances(x)
    return np.exp(-((d / (width * np.median(d[~np.eye(len(d), dtype=bool)]) or 1.0)) ** 2) / 2)


def hsic(k: Kernel, other: Kernel) -> float:
    """The debiased Hilbert-Schmidt independence criterion. Raises InputError for fewer than four
    samples."""
    n = len(k)
    if k.shape != other.shape or n < LEAST:
        raise InputError(
            f"kernels of {n} and {len(other)} samples: both need the same ones, at least {LEAST}."
        )
    a, b = (np.where(np.eye(n, dtype=bool), 0.0, m) for m in (k, other))
    whole = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(
        ((a * b).sum() + whole - 2 * (a.sum(axis=0) @ b.sum(axis=0)) / (n - 2)) / (n * (n - 3))
    )


def centred(k: Kernel) -> Kernel:
    """A kernel as HSIC sees it, divided by its length: rows and columns sum to 0, and the diagonal
    is left out.

    The inner product of two of them is their CKA, in whatever order the samples stand. NaN where
    HSIC is not above 0.
    """
    n, a = len(k), np.where(np.eye(len(k), dtype=bool), 0.0, k)
    rows = a.sum(axis=0) / (n - 2)
    a = np.where(np.eye(n, dtype=bool), 0.0, a - rows[:, None] - rows + rows.sum() / (n - 1))
    size = hsic(k, k) * n * (n - 3)
    return a / (size**0.5 if size > 0 else np.nan)


def ranks(d: Kernel) -> Kernel:
    """Ranks of the distances, centred and of length one, on both sides of the diagonal, which is 0.

    The inner product of two of them is their RSA. NaN where all distances are equal.
    """
    above, table = np.triu_indices(len(d), 1), np.zeros_like(d)
    # five digits, so that rounding breaks no tie: small whole numbers, ranked by counting them
    steps = np.rint(d[above] / (d.max() or 1.0) * 1e5).astype(np.int64)
    count = np.bincount(steps)
    order = (np.cumsum(count) - (count - 1) / 2)[steps]
    order = order - order.mean()
    length = np.linalg.norm(order)
    table[above] = order / (length * 2**0.5 if length > 0 else np.nan)
    return table + table.T


def cka(k: Kernel, other: Kernel) -> float:
    """Centred kernel alignment: 1 for equal kernels, 0 in the mean for unrelated ones, NaN for one
    that says nothing."""
    return float((centred(k) * centred(other)).sum())


def rsa(d: Kernel, other: Kernel) -> float:
    """Spearman correlation of the distances above the diagonal; NaN where all are equal."""
    return float((ranks(d) * ranks(other)).sum())


def compare(
    one: Samples, two: Float[np.ndarray, "sample other"], *, groups: int = 20, seed: int = 0
) -> dict[str, float]:
    """linear, rbf, rsa; each also with `null_`, `null_high_`, `low_` and `high_` before it:
    shuffled, and the interval, whose ends are NaN for fewer than five groups.

    Raises InputError for fewer than four samples, or not as many in both.
    """
    if len(one) != len(two) or len(one) < LEAST:
        raise InputError(
            f"{len(one)} and {len(two)} samples: give the same ones to both, at least {LEAST}."
        )
    generator, n = np.random.default_rng(seed), len(one)
    orders = [generator.permutation(n) for _ in range(SHUFFLES)]
    dealt = min(groups, n) if n > LEAST else 0  # as many as leave enough samples
    left = np.array_split(generator.permutation(n), dealt) if dealt >= FEWEST else []
    kinds = {
        "linear": (linear, centred, cka),
        "rbf": (rbf, centred, cka),
        "rsa": (distances, ranks, rsa),
    }
    values: dict[str, float] = {}
    for name, (kernel, ready, score) in kinds.items():
        a, b = kernel(one), kernel(two)
        x, y = ready(a), ready(b)
        values[name] = float((x * y).sum())
        null = [float((x * y[np.ix_(order, order)]).sum()) for order in orders]
        values[f"null_{name}"], values[f"null_high_{name}"] = np.mean(null), bound(np.abs(null))
        values[f"low_{name}"], values[f"high_{name}"] = _jackknife(a, b, score, left, values[name])
    return values


def _jackknife(
    a: Kernel,
    b: Kernel,
    score: Callable[[Kernel, Kernel], float],
    left: list[np.ndarray],
    whole: float,
) -> tuple[float, float]:
    """The interval of a score of all samples, from its scores without each of some groups."""
    rest = [np.delete(np.arange(len(a)), group) for group in left]
    without = np.array([score(a[np.ix_(r, r)], b[np.ix_(r, r)]) for r in rest])
    values = len(left) * whole - (len(left) - 1) * without
    if not np.isfinite(values).all():
        return np.nan, np.nan
    ends = interval(values, method="t")  # of fewer than five it gives NaN
    return max(ends.low, -1.0), min(ends.high, 1.0)  # beyond which no score lies


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    other: LM | None = None,
    corrupt: Any = None,
    site: str = "resid_post",
    samples: Literal["tokens", "texts"] = "tokens",
    most: int = 500,
    groups: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """`compare`'s numbers for each layer: (layer).

    other: the model that reads the same (default: `lm` itself); its layer at the same relative
    depth is taken. corrupt: what the other reads instead, another view of each input. samples:
    tokens (of a picture, its patches), one for one, or texts, the mean over each. most: samples
    kept, drawn at random. groups: of samples, left out in turn for the interval. Raises InputError
    when the two have not the same samples, or fewer than four.
    """
    if samples not in ("tokens", "texts"):
        raise InputError(f"samples={samples!r}: choose tokens or texts.")
    second = lm if other is None else other
    one = _layers(lm, inputs, site, samples)
    two = _layers(second, inputs if corrupt is None else corrupt, site, samples)
    if len(one[0]) != len(two[0]):
        raise InputError(
            f"{len(one[0])} and {len(two[0])} {samples}: compare texts, or inputs of equal length."
        )
    sample = np.sort(np.random.default_rng(seed).permutation(len(one[0]))[:most])
    paired = np.round(np.linspace(0, len(two) - 1, len(one))).astype(int)
    rows = [
        compare(a[sample], two[p][sample], groups=groups, seed=seed) for a, p in zip(one, paired)
    ]
    return dataset(
        {name: (("layer",), [row[name] for row in rows]) for name in rows[0]},
        method="embeddings.similarity",
        provenance=lm.provenance,
        settings={
            "site": site,
            "samples": samples,
            "number": len(sample),
            "other": second.provenance,
        },
        seed=seed,
        coords={"layer": list(range(len(one))), "other_layer": (("layer",), paired)},
        null_kind=NULL,
    )


def _layers(lm: LM, inputs: Any, site: str, samples: str) -> list[Samples]:
    """The representation of every sample in each layer."""
    batch = lm.batch(inputs)
    names = [f"layers.{layer}.{site}" for layer in range(lm.dims.layers)]
    if samples == "texts":
        return [
            relative_representations.embed(lm, batch, site=name).cpu().numpy() for name in names
        ]
    seen = capture(lm, batch, *names)
    if batch.mask is None:  # pictures: every patch is real
        return [seen[name].flatten(0, 1).float().cpu().numpy() for name in names]
    real: Tensor = batch.mask.bool()
    return [seen[name][real.to(seen[name].device)].float().cpu().numpy() for name in names]
