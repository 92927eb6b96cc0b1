"""Convergent learning: which neurons of one network another network has learned too, alone, as a
few, or as a group.

Paper: convergent-learning

    c[i, j]  = corr over tokens of (a_one[i], a_two[j])                      a = mlp.act of the two
             networks, same tokens
    matched  = the one-to-one assignment of i to j with the largest sum of c  (bipartite matching)
    best     = argmax over j of c[i, j]                                       (semi-matching: j may
             serve several i)
    lasso    = the few neurons of two that predict neuron i of one together   (one-to-many)
    groups   = spectral clusters of the neurons of both, affinity max(c, 0)   (many-to-many)
    subspace = corr of neuron i with its ridge prediction from all of two, on samples that were not
        fitted

The last is ours, for the paper's second finding: it does not depend on the basis of the second
network, so what it has above `matched` is shared as a subspace only. The abstract leaves affinity
and clustering open; correlation within and between networks is used, and scikit-learn's normalised
cut.

null: matched correlations after the second network's samples are shuffled: what an optimal matching
makes of noise. And permuted: the correlation with a partner drawn at random, without matching.
Reads as: how far two networks speak of the same things with the same neurons. Does not show that a
neuron does the same for the output, and correlates over the inputs given only: many and varied
tokens are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models import source
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "the same matching after the second network's samples are shuffled"
Samples = Float[np.ndarray, "sample unit"]


def standardised(x: Samples) -> Samples:
    """Mean 0 and deviation 1 along samples; a unit that never changes becomes 0."""
    x = np.asarray(x, dtype=np.float64)
    moved, spread = x - x.mean(axis=0), x.std(axis=0)
    steady = spread <= 1e-9 * np.abs(x).max(axis=0, initial=0.0)
    return np.where(steady, 0.0, moved / np.where(steady, 1.0, spread))


def correlation(
    one: Samples, two: Float[np.ndarray, "sample other"]
) -> Float[np.ndarray, "unit other"]:
    """Pearson correlation of every unit with every unit of the other; 0 for one that never
    changes."""
    if len(one) != len(two) or len(one) < 2:
        raise InputError(
            f"{len(one)} and {len(two)} samples: both networks must see the same ones, at least "
            "two."
        )
    return standardised(one).T @ standardised(two) / len(one)


def matching(c: Float[np.ndarray, "unit other"]) -> Int[np.ndarray, " unit"]:
    """The other's unit for each unit, none twice, with the largest sum of correlations; -1 where
    none is left."""
    rows, columns = linear_sum_assignment(c, maximize=True)
    found = np.full(len(c), -1)
    found[rows] = columns
    return found


def semi_matching(c: Float[np.ndarray, "unit other"]) -> Int[np.ndarray, " unit"]:
    """The other's most correlated unit for each unit; one may serve several."""
    return c.argmax(axis=1)


def picked(
    c: Float[np.ndarray, "unit other"], found: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, " unit"]:
    """The correlation of each unit with the one found for it; NaN where there is none."""
    return np.where(found < 0, np.nan, c[np.arange(len(c)), found])


def lasso(
    one: Samples, two: Float[np.ndarray, "sample other"], *, penalty: float = 0.1
) -> Float[np.ndarray, "unit other"]:
    """Weights W of the standardised min |one - two W^T|^2 / (2 samples) + penalty |W|_1: mostly
    0."""
    from sklearn.linear_model import Lasso

    fitted = Lasso(alpha=penalty, fit_intercept=False, max_iter=5000)
    return np.atleast_2d(fitted.fit(standardised(two), standardised(one)).coef_)


def subspace(
    one: Samples, two: Float[np.ndarray, "sample other"], *, ridge: float = 1e-3
) -> Float[np.ndarray, " unit"]:
    """Correlation of each unit with its linear prediction from all of the other's, on the half that
    was not fitted.

    The first half of the samples is fitted, the second judged. ridge: beside unit variance. 0 for a
    constant unit.
    """
    x, y, half = standardised(two), standardised(one), len(one) // 2
    gram = x[:half].T @ x[:half] / half + ridge * np.eye(x.shape[1])
    predicted = x[half:] @ np.linalg.solve(gram, x[:half].T @ y[:half] / half)
    return (standardised(predicted) * standardised(y[half:])).mean(axis=0)


def groups(
    one: Samples, two: Float[np.ndarray, "sample other"], *, count: int, seed: int = 0
) -> tuple[Int[np.ndarray, " unit"], Int[np.ndarray, " other"]]:
    """Group numbers of both networks' units under one spectral clustering of them all."""
    from sklearn.cluster import SpectralClustering

    both = np.concatenate([one, two], axis=1)
    affinity = correlation(both, both).clip(0) + 1e-9  # a unit that never changes belongs anywhere
    found = SpectralClustering(count, affinity="precomputed", random_state=seed).fit_predict(
        affinity
    )
    return found[: one.shape[1]], found[one.shape[1] :]


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, other: LM, site: str = "mlp.act", seed: int = 0) -> xr.Dataset:
    """For each neuron of `lm`: its partner in the same layer of `other`, and their correlation;
    (layer, neuron).

    other: a model with the same vocabulary and at least as many layers. site: mlp.act or mlp.pre.
    seed: of the null's shuffle. best is the semi-matching; partners are -1, and correlations NaN,
    where the other has fewer neurons. Raises InputError when vocabularies or layers do not fit,
    SiteError for a mixture of experts.
    """
    if site not in ("mlp.act", "mlp.pre"):
        raise InputError(f"site={site!r}: neurons are seen at mlp.act or mlp.pre.")
    if (lm.dims.vocab, min(lm.dims.layers, other.dims.layers)) != (
        other.dims.vocab,
        lm.dims.layers,
    ):
        raise InputError(
            f"`other` has {other.dims.vocab} tokens and {other.dims.layers} layers; give one with "
            f"{lm.dims.vocab} tokens "
            f"and at least {lm.dims.layers} layers, so that both read the same ids and layers can "
            "be paired."
        )
    source.refuse(lm, "two such models are not compared yet on the same prompts")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    same = {"input_ids": ids.cpu(), "attention_mask": mask.cpu()}
    generator = np.random.default_rng(seed)
    shuffle = generator.permutation(int(mask.sum()))
    found: dict[str, list[np.ndarray]] = {
        key: []
        for key in ("partner", "correlation", "best", "best_correlation", "null", "permuted")
    }
    name = f"layers.*.{site}"
    one, two = (
        [
            seen[at][mask.to(model.model.device)].float().cpu().numpy()
            for at in seen.sites[: lm.dims.layers]
        ]
        for model, seen in ((lm, capture(lm, batch, name)), (other, capture(other, same, name)))
    )
    for a, b in zip(one, two):
        c, noise = correlation(a, b), correlation(a, b[shuffle])
        partner, best = matching(c), semi_matching(c)
        drawn = np.resize(generator.permutation(c.shape[1]), len(c))
        null = picked(noise, matching(noise)), picked(c, drawn)
        rows = (partner, picked(c, partner), best, picked(c, best), *null)
        for key, values in zip(found, rows):
            found[key].append(values)
    return dataset(
        {key: (("layer", "neuron"), np.stack(values)) for key, values in found.items()},
        method="neurons.convergent_learning",
        provenance=lm.provenance,
        settings={"site": site, "other": other.provenance, "tokens": len(shuffle)},
        seed=seed,
        coords={"layer": list(range(lm.dims.layers))},
        null_kind=NULL,
    )
