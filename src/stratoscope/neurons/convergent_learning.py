"""Convergent learning: which neurons of one network another network has learned too, alone, as a
few, or as a group.

Paper: convergent-learning

    c[i, j]  = corr over tokens of (a_one[i], a_two[j])                      a = mlp.act of the two
             networks, same tokens
    matched  = the one-to-one assignment of i to j with the largest sum of c  (bipartite matching)
    best     = argmax over j of c[i, j]                                       (semi-matching: j may
             serve several i)
    few      = corr of neuron i with its lasso prediction from all of two     (one-to-many)
    subspace = corr of neuron i with its ridge prediction from all of two
    groups   = spectral clusters of the neurons of both, affinity max(c, 0)   (many-to-many)

few and subspace are fitted on the first half of the samples and judged on the second. subspace is
ours, for the paper's second finding: it does not depend on the basis of the second network, so what
it has above `matched` is shared as a subspace only. The abstract leaves affinity and clustering
open; correlation within and between networks is used, and scikit-learn's normalised cut.
`compare` takes the activations of any two networks, whatever they read.

null: the same after the second network's samples are shuffled: what an optimal matching, or a
prediction, makes of noise. And permuted: the correlation with a partner drawn at random, without
matching.
Reads as: how far two networks speak of the same things with the same neurons. Does not show that a
neuron does the same for the output, and correlates over the inputs given only: many and varied
tokens are needed, for few and subspace several times as many as neurons.
Cost: one pass of each network; matching is cubic in the neurons. few takes a minute a layer of 500
neurons and 2,000 tokens, and again for its null; groups a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from stratoscope.neurons._predicted import Samples, few, standardised, subspace
from stratoscope.neurons._predicted import lasso as lasso
from stratoscope.results import dataset

NULL = "the same after the second network's samples are shuffled"
AXES = {"other_neuron": "a hidden unit of one layer's MLP of the other model"}


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
    partner = np.full(len(c), -1)
    partner[rows] = columns
    return partner


def semi_matching(c: Float[np.ndarray, "unit other"]) -> Int[np.ndarray, " unit"]:
    """The other's most correlated unit for each unit; one may serve several."""
    return c.argmax(axis=1)


def picked(
    c: Float[np.ndarray, "unit other"], partner: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, " unit"]:
    """The correlation of each unit with the one found for it; NaN where there is none."""
    return np.where(partner < 0, np.nan, c[np.arange(len(c)), partner])


def groups(
    one: Samples, two: Float[np.ndarray, "sample other"], *, count: int, seed: int = 0
) -> tuple[Int[np.ndarray, " unit"], Int[np.ndarray, " other"]]:
    """Group numbers of both networks' units under one spectral clustering of them all."""
    from sklearn.cluster import SpectralClustering

    pair = np.concatenate([one, two], axis=1)
    affinity = correlation(pair, pair).clip(0) + 1e-9  # a unit that never changes belongs anywhere
    group_of = SpectralClustering(count, affinity="precomputed", random_state=seed).fit_predict(
        affinity
    )
    return group_of[: one.shape[1]], group_of[one.shape[1] :]


def compare(
    one: Samples,
    two: Float[np.ndarray, "sample other"],
    *,
    penalty: float | None = None,
    ridge: float | None = None,
    count: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What `measure` gives of a layer, by name, (unit,), from what two networks do on the same
    samples; group_other is (other,).

    penalty, ridge, count: of few, subspace and groups, which are left out where none is given.
    Raises InputError for samples that differ in number or are fewer than two (for few and subspace
    four), a penalty or ridge that is not above 0, and a count below two or above the units of both.
    """
    _check((len(one), one.shape[1] + two.shape[1]), penalty, ridge, count)
    generator = np.random.default_rng(seed)
    mixed = two[generator.permutation(len(two))]
    c, noise = correlation(one, two), correlation(one, mixed)
    partner, best = matching(c), semi_matching(c)
    out = {
        "partner": partner,
        "correlation": picked(c, partner),
        "best": best,
        "best_correlation": picked(c, best),
        "null": picked(noise, matching(noise)),
        "permuted": picked(c, np.resize(generator.permutation(c.shape[1]), len(c))),
    }
    if penalty is not None:
        out["few"], out["few_used"] = few(one, two, penalty=penalty)
        out["null_few"] = few(one, mixed, penalty=penalty)[0]
    if ridge is not None:
        out["subspace"] = subspace(one, two, ridge=ridge)
        out["null_subspace"] = subspace(one, mixed, ridge=ridge)
    if count is not None:
        for before, other in (("", two), ("null_", mixed)):
            group = groups(one, other, count=count, seed=seed)
            sizes = [np.bincount(side, minlength=count) for side in group]
            out[f"{before}group_share"] = (sizes[1] / np.maximum(sum(sizes), 1))[group[0]]
            if not before:
                out["group"], out["group_other"] = group
    return out


def _check(
    shape: tuple[int, int], penalty: float | None, ridge: float | None, count: int | None
) -> None:
    samples, units = shape
    if min(penalty or 1.0, ridge or 1.0) < 0 or 0 in (penalty, ridge):
        raise InputError(f"penalty={penalty}, ridge={ridge}: give numbers above 0, or None.")
    if (penalty or ridge) and samples < 4:
        raise InputError(f"{samples} samples: half of them are fitted, so that four are needed.")
    if count is not None and not 2 <= count <= units:
        raise InputError(f"count={count} groups of {units} units: choose 2 to as many.")


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    other: LM,
    site: str = "mlp.act",
    layers: Sequence[int] | None = None,
    penalty: float | None = None,
    ridge: float | None = None,
    count: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """For each neuron of `lm`: its partner in the same layer of `other`, and their correlation;
    (layer, neuron). And where they are asked for:

    few, and few_used, how many of the other's neurons it takes (penalty: of the lasso, 0.1 in the
    paper's spirit); subspace (ridge: beside unit variance, 1e-3 is little); group, group_other
    (layer, other_neuron), and group_share, the part of a neuron's group that is of `other` (count:
    of groups). Each with its null.

    other: a model with the same vocabulary and at least as many layers. site: mlp.act or mlp.pre.
    layers: default all. seed: of the null's shuffle. best is the semi-matching; partners are -1,
    and correlations NaN, where the other has fewer neurons. Raises InputError when vocabularies or
    layers do not fit, and as `compare` does, SiteError for a mixture of experts.
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
    chosen = list(range(lm.dims.layers)) if layers is None else list(layers)
    if not chosen or not all(0 <= layer < lm.dims.layers for layer in chosen):
        raise InputError(f"layers={chosen}: choose among 0 to {lm.dims.layers - 1}.")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    same = {"input_ids": ids.cpu(), "attention_mask": mask.cpu()}
    names = [f"layers.{layer}.{site}" for layer in chosen]
    pairs = [
        [seen[at][mask.to(model.model.device)].float().cpu().numpy() for at in names]
        for model, seen in ((lm, capture(lm, batch, *names)), (other, capture(other, same, *names)))
    ]
    rows = [
        compare(a, b, penalty=penalty, ridge=ridge, count=count, seed=seed) for a, b in zip(*pairs)
    ]
    axis = {"group_other": "other_neuron"}
    return dataset(
        {
            key: (("layer", axis.get(key, "neuron")), np.stack([row[key] for row in rows]))
            for key in rows[0]
        },
        method="neurons.convergent_learning",
        provenance=lm.provenance,
        settings={
            "site": site,
            "other": other.provenance,
            "tokens": int(mask.sum()),
            "penalty": penalty,
            "ridge": ridge,
            "count": count,
        },
        seed=seed,
        coords={"layer": chosen},
        null_kind=NULL,
        notes=_notes(pairs, penalty is not None or ridge is not None),
    )


def _notes(pairs: Sequence[Sequence[Samples]], predicts: bool) -> str:
    fitted, units = len(pairs[1][0]) // 2, max(x.shape[1] for x in pairs[1])
    if not predicts or fitted >= units:
        return ""
    return (
        f"Predictions were fitted to {fitted} tokens with {units} neurons: they say little of what "
        "is shared. Give more text."
    )
