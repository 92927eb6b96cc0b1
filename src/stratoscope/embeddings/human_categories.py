"""Human categories: whether clusters of embeddings are the kinds that people know, and which of the
two costs less.

Paper: tokens-to-thoughts

    complexity = I(X; C)   = log2 n - sum_c (n_c / n) log2 n_c                     n examples, n_c
                           of them in c: bits
    distortion             = sum_c (n_c / n) mean over c of |e[example] - mean_c|^2
    objective              = complexity + beta * distortion                         the less, the
                           more compressed
    ami[draw]              = adjusted mutual information of k-means clusters and human categories,
                           as many of each
    saving[beta, size]     = (objective of the categories - objective of k-means) / (log2 n + beta)
                           k-means with size * (number of categories) clusters
    typicality[example]    = cos(e[example], mean of the others of its category)

Embeddings are centred and divided by one number, so that their total variance is 1: the units of a
space would otherwise set the price of distortion. The paper takes them as they are; beta is
therefore not its beta.

null: the same numbers for the human categories, shuffled among the examples; of `saving`, a space
in which the kinds are all there is (`gaussian`): each a Gaussian of its own mean, one covariance.
Reads as: whether kinds are heaps in the space; and whether the space itself would have cut it more
cheaply. Does not show that people pay for meaning: k-means minimises distortion in this very space,
which people never saw, so that it wins this half by construction: what it saves counts only beyond
what it saves among Gaussian kinds. A cosine says little where all embeddings point one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

from stratoscope.embeddings import relative_representations
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "human categories, shuffled among the examples; of saving, Gaussian kinds"
# even steps of log beta; numbers of clusters, as parts of the number of categories
BETAS, SIZES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), (0.5, 1.0, 2.0)
Embeddings = Float[np.ndarray, "example dim"]
Labels = Int[np.ndarray, " example"]


def scaled(e: Embeddings) -> Embeddings:
    """Mean 0 and total variance 1; zeros when all embeddings are equal."""
    moved = np.asarray(e, dtype=np.float64) - np.mean(e, axis=0, dtype=np.float64)
    return moved / (np.sqrt((moved**2).sum(axis=1).mean()) or 1.0)


def complexity(labels: Labels) -> float:
    """I(X; C) in bits, when each example is as likely as any other and has one category."""
    sizes = np.unique(labels, return_counts=True)[1]
    return float(np.log2(len(labels)) - (sizes * np.log2(sizes)).sum() / len(labels))


def distortion(e: Embeddings, labels: Labels) -> float:
    """Mean squared distance to the mean of the own category, in the units of `e`."""
    kinds, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(kinds), e.shape[1]))
    np.add.at(means, inverse, e)
    return float(((e - (means / sizes[:, None])[inverse]) ** 2).sum(axis=1).mean())


def objective(e: Embeddings, labels: Labels, *, beta: float = 1.0) -> float:
    """complexity + beta * distortion."""
    return complexity(labels) + beta * distortion(e, labels)


def clusters(e: Embeddings, count: int, *, seed: int = 0) -> Labels:
    """K-means, the best of four starts. Raises InputError for more clusters than examples."""
    from sklearn.cluster import KMeans

    if not 1 <= count <= len(e):
        raise InputError(f"{count} clusters of {len(e)} examples: ask for 1 to {len(e)}.")
    if count == len(e):
        return np.arange(count)  # also where examples are equal, which k-means would warn about
    return KMeans(count, n_init=4, random_state=seed).fit(e).labels_.astype(np.int64)


def savings(
    e: Embeddings,
    labels: Labels,
    *,
    betas: Sequence[float] = BETAS,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
) -> Float[np.ndarray, "beta size"]:
    """What k-means costs less than the categories, in parts of log2 n + beta, the most that a
    partition costs; below 0 where the categories are cheaper. Their mean is the area over log beta.
    """
    x, n, count = scaled(e), len(e), len(np.unique(labels))
    saved = []
    for size in sizes:
        own = clusters(x, min(max(round(size * count), 1), n), seed=seed)
        saved.append(
            [
                (objective(x, labels, beta=b) - objective(x, own, beta=b)) / (np.log2(n) + b)
                for b in betas
            ]
        )
    return np.array(saved).T


def gaussian(
    e: Embeddings, labels: Labels, generator: np.random.Generator, *, lengths: bool = False
) -> Embeddings:
    """Other examples of the same categories, in a space where these are all there is: each is a
    Gaussian around its mean, all of one covariance, that of the examples around their means.

    The means are drawn together by what chance alone holds them apart. lengths: each example stays
    as far from its mean as the one it stands for, so that outliers stay outliers.
    """
    kinds, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    n, k, centre = len(e), len(kinds), np.mean(e, axis=0)
    means = np.zeros((k, e.shape[1]))
    np.add.at(means, inverse, e)
    means = means / sizes[:, None] - centre
    rest = e - centre - means[inverse]
    free = max(n - k, 1)
    apart = (sizes[:, None] * means**2).sum()
    by_chance = (k - 1) * (rest**2).sum() / free
    means *= np.sqrt(max(1 - by_chance / apart, 0.0)) if apart > 0 else 1.0
    drawn = generator.normal(size=(n, n)) @ rest / np.sqrt(free)
    if lengths:
        own, new = (np.linalg.norm(x, axis=1, keepdims=True) for x in (rest, drawn))
        drawn *= own * np.sqrt(n / free) / np.where(new > 0, new, 1.0)
    return centre + means[inverse] + drawn


def shared(one: Labels, two: Labels) -> float:
    """Adjusted mutual information: 1 for the same partition, 0 in the mean over shuffled ones."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(one, two))


def typicality(
    e: Embeddings, labels: Labels, means: Labels | None = None
) -> Float[np.ndarray, " example"]:
    """Cosine of each example with the mean of category `means[example]` (default: its own), itself
    left out.

    NaN for the only one of its category.
    """
    means = labels if means is None else means
    near = np.full(len(e), np.nan)
    for example, wanted in enumerate(means):
        others = (labels == wanted) & (np.arange(len(e)) != example)
        if others.any():
            mean = e[others].mean(axis=0)
            near[example] = (
                e[example] @ mean / (np.linalg.norm(e[example]) * np.linalg.norm(mean) or 1.0)
            )
    return near


def compare(
    e: Embeddings, labels: Labels, *, beta: float = 1.0, draws: int = 5, seed: int = 0
) -> dict[str, Float[np.ndarray, " draw"]]:
    """ami, complexity, distortion, objective of k-means; the same with `human_` and, shuffled, with
    `null_` before them; saving, the mean of `savings`, and null_saving, that of Gaussian kinds.

    Each over `draws`: another start of k-means and another shuffle. beta: bits for the whole
    variance of the space.
    """
    x, count, generator = scaled(e), len(np.unique(labels)), np.random.default_rng(seed)
    by_measure: dict[str, list[float]] = {}
    for draw in range(draws):
        own, mixed = clusters(x, count, seed=1000 * seed + draw), generator.permutation(labels)
        for before, partition in (("", own), ("human_", labels), ("null_", mixed)):
            bits, spread = complexity(partition), distortion(x, partition)
            row = {"complexity": bits, "distortion": spread, "objective": bits + beta * spread}
            for name, value in row.items():
                by_measure.setdefault(before + name, []).append(value)
        by_measure.setdefault("ami", []).append(shared(own, labels))
        by_measure.setdefault("null_ami", []).append(shared(own, mixed))
        rival = gaussian(x, labels, generator)
        for name, space in (("saving", x), ("null_saving", rival)):
            by_measure.setdefault(name, []).append(
                float(savings(space, labels, seed=1000 * seed + draw).mean())
            )
    return {name: np.array(values) for name, values in by_measure.items()}


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    categories: Sequence[str] | None = None,
    site: str = "layers.-1.resid_post",
    pooling: relative_representations.Pooling = "mean",
    beta: float = 1.0,
    draws: int = 5,
    seed: int = 0,
) -> xr.Dataset:
    """`compare`'s numbers, (draw), for inputs whose human categories are named.

    categories: one name for each input (default: each input its own: nothing to compress). site:
    where the embedding of an input is read; the paper reads token embeddings, `layers.0.resid_pre`.
    pooling: over an input's tokens. beta: bits for the whole variance. Raises InputError when names
    and inputs differ in number, SiteError for a site without positions.
    """
    e = relative_representations.embed(lm, inputs, site=site, pooling=pooling).cpu().numpy()
    names = list(map(str, range(len(e)))) if categories is None else list(categories)
    if len(names) != len(e):
        raise InputError(f"{len(names)} categories for {len(e)} inputs: give one for each.")
    kinds, labels = np.unique(names, return_inverse=True)
    return dataset(
        {
            name: (("draw",), values)
            for name, values in compare(e, labels, beta=beta, draws=draws, seed=seed).items()
        },
        method="embeddings.human_categories",
        provenance=lm.provenance,
        settings={"site": site, "pooling": pooling, "beta": beta, "categories": kinds.tolist()},
        seed=seed,
        null_kind=NULL,
    )
