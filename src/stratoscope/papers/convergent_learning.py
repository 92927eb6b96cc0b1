"""Convergent Learning: Do different neural networks learn the same representations?

Li, Yosinski, Clune, Lipson and Hopcroft, 2015. arXiv:1511.07543.
Claim: networks that differ only in their seed learn some units alike and others not, and the
    subspaces that units span are shared more than the units themselves.
Methods: neurons.convergent_learning
Protocol: AlexNets of four seeds on ImageNet, the five convolutional layers; bipartite and
    semi-matching, lasso and spectral clusters on 50,000 validation pictures; the four nets, not
    their units, counted.
What would change our mind: units of trained nets that match no better than a trained net's match
    those of one that has learned nothing; or a single partner that tells as much of a unit as all
    units of the other net together.
What the authors may object: our nets have two layers of some hundred units and read digits, theirs
    are AlexNets; we read the abstract alone, so that affinity, clusters and the lasso's penalty are
    our choice; a linear prediction from all units is ours, and many random features predict as
    well, which is why a net that has learned nothing stands beside it.

The paper compares AlexNets on ImageNet; here small MNIST nets, and a tiny language model, take
their place.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import data, make, small_nets
from stratoscope.maths.resample import interval
from stratoscope.neurons import convergent_learning as cl

PAIRS, STEPS, TRAIN, TEST = 6, 500, 20_000, 4_000
# of small_nets.mlp: how many of its parts give a layer's units
LAYERS = {"first layer": 3, "second layer": 5}
GROUPS, LASSO, RIDGE, TEXTS = 16, 0.1, 1e-3, 24


@claim(
    says="Matching finds the units that two networks share",
    where="abstract (bipartite matching, sparse prediction)",
    tier="identity",
    subject="random units, and the same permuted with noise",
    expect="matched == 1 and best == 1 and lasso == 1 and rotated < 0.2",
    null={
        "rotated": "units of the same network after a rotation of its space: one subspace, "
        "but no unit is the same"
    },
)
def a_permuted_copy_is_found(seed: int) -> Measured:
    """The share of 32 units that each way finds again among a permuted copy with a tenth of
    noise."""
    generator = np.random.default_rng(seed)
    one, order = generator.normal(size=(600, 32)), generator.permutation(32)
    copy = one[:, order] + 0.3 * generator.normal(size=one.shape)
    turned = one @ np.linalg.qr(generator.normal(size=(32, 32)))[0]
    truth, c = order.argsort(), cl.correlation(one, copy)
    ways = {"matched": cl.matching(c), "best": cl.semi_matching(c)}
    ways["lasso"] = np.abs(cl.lasso(one, copy, penalty=LASSO)).argmax(axis=1)
    return Measured(
        values={name: (found == truth).mean() for name, found in ways.items()},
        null={"rotated": (cl.matching(cl.correlation(one, turned)) == np.arange(32)).mean()},
        n=32,
    )


@claim(
    says="Some features are learned reliably in several networks, others are not",
    where="abstract, finding 1",
    read="abstract",
    tier="small",
    subject="MNIST classifiers of twelve seeds",
    kind="miniature",
    n="6 pairs of networks",
    expect="matched_low > untrained_high + 0.2 and matched_low > 3 * permuted and matched_low > "
    "3 * shuffled and alike_low > 0 and alone_low > 0",
    direction="matched_low > untrained_high and matched > permuted and matched > shuffled",
    null={
        "permuted": "units paired at random",
        "shuffled": "the same matching with the other net's pictures shuffled",
        "untrained": "the same matching with a net that has learned nothing",
    },
    thresholds="3, and 0.9 and 0.4 in `alike` and `alone`: the ledger's; 0.2 above a net that has "
    "learned nothing: the review's",
)
def some_units_converge_and_some_do_not(seed: int) -> Measured:
    """Bipartite matching of the units of two MLPs by correlation on test pictures, both layers, in
    six pairs of nets that share no net. alike: share of units matched above 0.9; alone: share that
    no unit of the other net, also one that serves another, resembles to 0.4, so that no poor tail
    of a matching is meant. Units that never change on the test pictures are left out."""
    pairs, x = _pairs(seed)
    names = ("matched", "alike", "alone", "permuted", "shuffled", "untrained")
    rows: list[list[float]] = []
    curves = []
    for number, nets in enumerate(pairs):
        layers: list[np.ndarray] = []
        for parts in LAYERS.values():
            one, two = (_live(_act(net, parts, x)) for net in nets)
            start = _live(_start(parts, x, 1000 * seed + 500 + number))
            pair = cl.compare(one, two, seed=seed)
            bare = cl.compare(one, start, seed=seed)["correlation"]
            three = [y[~np.isnan(y)] for y in (pair["correlation"], pair["null"], bare)]
            shares = [(three[0] > 0.9).mean(), (pair["best_correlation"] < 0.4).mean()]
            chance = [pair["permuted"].mean(), *(y.mean() for y in three[1:])]
            layers.append(np.array([three[0].mean(), *shares, *chance]))
            curves.append(three)
        rows.append(list(np.mean(layers, axis=0)))
    units = dict(zip(names, np.array(rows).T))
    at = np.linspace(0, 1, 21)
    lines = [np.quantile(np.concatenate(kind), at) for kind in zip(*curves)]
    low, high = interval(units["untrained"])[1:3]
    return Measured(
        null={name: units[name].mean() for name in names[3:]},
        n=PAIRS,
        units={name: units[name] for name in names[:3]},
        interval={"untrained": (low, high)},
        figure=xr.DataArray(
            lines,
            {"net": ["other seed", "shuffled", "untrained"], "share_of_units": at},
            ["net", "share_of_units"],
            name="correlation",
            attrs={"title": "correlation of matched units, from the least to the most alike"},
        ),
    )


@claim(
    says="Units span low-dimensional subspaces that networks share, while the basis "
    "vectors are not shared",
    where="abstract, finding 2",
    read="abstract",
    tier="small",
    subject="MNIST classifiers of twelve seeds",
    kind="miniature",
    n="6 pairs of networks",
    expect="gain_low > 0.1 and few_gain_low > 0 and subspace_low > untrained_subspace_high",
    direction="gain_low > 0",
    null={
        "untrained_subspace": "prediction from a net that has learned nothing",
        "shuffled_subspace": "prediction from shuffled pictures",
    },
    thresholds="0.1: the ledger's",
)
def subspaces_converge_more_than_units(seed: int) -> Measured:
    """How well a unit is told by its one partner, by a few units (lasso), and by all units of the
    other net (ridge).

    Each is a correlation on pictures that were not fitted. An untrained net predicts a good deal as
    well: its random features are many. groups is the share of spectral clusters that hold units of
    both nets.
    """
    pairs, x = _pairs(seed)
    rows, half = [], len(x) // 2
    for number, nets in enumerate(pairs):
        for parts in LAYERS.values():
            one, two = (_act(net, parts, x) for net in nets)
            one = one[:, one[:half].std(axis=0) > 0]
            start = _start(parts, x, 1000 * seed + 500 + number)
            pair = cl.compare(one, two, penalty=LASSO, ridge=RIDGE, count=GROUPS, seed=seed)
            common = {*pair["group"].tolist()} & {*pair["group_other"].tolist()}
            bare = cl.compare(one, start, ridge=RIDGE, seed=seed)
            rows.append(
                {
                    "matched": np.nanmean(pair["correlation"]),
                    "few": pair["few"].mean(),
                    "units_used": pair["few_used"].mean(),
                    "subspace": pair["subspace"].mean(),
                    "groups": len(common) / GROUPS,
                    "untrained_subspace": bare["subspace"].mean(),
                    "shuffled_subspace": pair["null_subspace"].mean(),
                }
            )
    # both layers of a pair are one unit
    units = {name: np.reshape([row[name] for row in rows], (PAIRS, -1)).mean(1) for name in rows[0]}
    units |= {
        "gain": units["subspace"] - units["matched"],
        "few_gain": units["few"] - units["matched"],
    }
    means = {name: float(values.mean()) for name, values in units.items()}
    null = {name: means.pop(name) for name in ("untrained_subspace", "shuffled_subspace")}
    bars = {
        "one partner": means["matched"],
        "a few units": means["few"],
        "all units": means["subspace"],
    }
    bars |= {
        "all units, untrained": null["untrained_subspace"],
        "shuffled": null["shuffled_subspace"],
    }
    bare = interval(units["untrained_subspace"])
    return Measured(
        null=null,
        n=PAIRS,
        units={name: units[name] for name in means},
        interval={"untrained_subspace": (bare.low, bare.high)},
        figure=xr.DataArray(
            list(bars.values()), {"told_by": list(bars)}, ["told_by"], name="correlation"
        ),
    )


@claim(
    says="Some features are learned reliably in several networks, others are not",
    where="abstract, finding 1, which the paper shows for image networks only",
    read="abstract",
    tier="small",
    side=True,
    subject="tiny-gpt-small, two seeds",
    kind="miniature",
    n="2 networks",
    expect="matched > 3 * permuted and matched > 3 * shuffled and highest > 0.9 and lowest < 0.4",
    direction="matched > permuted and matched > shuffled and highest - lowest > 0.3",
    null={
        "permuted": "neurons paired at random",
        "shuffled": "the same matching with the other model's tokens shuffled",
    },
    thresholds="3, 0.9 and 0.4: the ledger's; `highest` and `lowest` are the extremes of all"
    " units; 0.3: ours",
)
def some_neurons_of_language_models_converge(seed: int) -> Measured:
    """Neurons of two tiny language models that differ in their seed alone, matched over the tokens
    of held-out text.

    Gated neurons have no preferred sign, which correlation does not forgive; the sign is kept all
    the same, as in the paper.
    """
    one, two = (models.load(make("tiny-gpt-small", seed=2 * seed + i)) for i in range(2))
    texts = [text[:600] for text in data("enwik8").test if len(text) > 600]
    drawn = np.random.default_rng(seed).permutation(len(texts))[:TEXTS]
    ids = [one.tokenizer(texts[i])["input_ids"][:200] for i in drawn]  # their context is 256 tokens
    found = cl.measure(one, ids, other=two, seed=seed)
    every = found.correlation.values
    return Measured(
        values={"matched": every.mean(), "highest": every.max(), "lowest": every.min()},
        null={"shuffled": found.null.mean(), "permuted": found.permuted.mean()},
        n=2,
        figure=found.correlation.mean("neuron"),
    )


def _pairs(seed: int) -> tuple[list[list[torch.nn.Module]], torch.Tensor]:
    """Pairs of MLPs that differ in their seed alone, no net in two pairs; and test pictures."""
    mnist = data("mnist")
    x, y = small_nets.ready(mnist.train, TRAIN, seed)
    nets = [
        small_nets.train(small_nets.mlp, x, y, seed=1000 * seed + i, steps=STEPS)
        for i in range(2 * PAIRS)
    ]
    return [nets[i : i + 2] for i in range(0, 2 * PAIRS, 2)], small_nets.ready(
        mnist.test, TEST, seed
    )[0]


@torch.no_grad()
def _act(net: torch.nn.Module, parts: int, x: torch.Tensor) -> np.ndarray:
    return net[:parts](x).numpy()


def _start(parts: int, x: torch.Tensor, seed: int) -> np.ndarray:
    """What a net does that has learned nothing."""
    return _act(small_nets.fresh(small_nets.mlp, seed), parts, x)


def _live(x: np.ndarray) -> np.ndarray:
    """Without the units that never change."""
    return x[:, cl.standardised(x).any(axis=0)]
