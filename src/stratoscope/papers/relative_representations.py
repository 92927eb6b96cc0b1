"""Relative representations enable zero-shot latent space communication.

Moschella, Maiorca, Fumero, Norelli, Locatello and Rodolà, 2022 (ICLR 2023). arXiv:2209.15430.
Claim: embeddings told by their cosines with shared anchors hardly depend on how a network was
    initialised, so that a decoder reads another network's encoder without training, and the spaces
    of unlike models become comparable.
Methods: embeddings.relative_representations
Protocol: the paper's autoencoders and classifiers on MNIST, CIFAR-10 and -100 over ten seeds and
    several architectures, FastText and Word2Vec of 300 dimensions on the words they share, 300
    parallel anchors; a least-squares map on the same anchors as the upper reference.

Anchors are drawn uniformly, 300 of them, as many as the paper takes for words (section 4.1).
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.embeddings import relative_representations as rr
from stratoscope.lab import data, small_nets

ANCHORS = 300
NETS, STEPS, TRAIN, TEST = 4, 400, 20_000, 4_000
WORDS, DRAWS = 4_000, 5


@claim(
    says="Relative representations do not change when a space is rotated, mirrored or scaled",
    where="abstract; section 3.3 (latent invariance)",
    tier="identity",
    subject="random vectors",
    expect="isometry < 0.00001 and shear > 0.01",
    null={"shear": "the same vectors sheared, which is no isometry"},
)
def isometries_do_not_matter(seed: int) -> Measured:
    """The largest change of any cosine under a rotation, a mirror and a scale together, and the
    mean one under a shear."""
    generator = torch.Generator().manual_seed(seed)
    x, turn = (
        torch.randn(200, 12, generator=generator),
        torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q,
    )
    shear = torch.eye(12) + torch.randn(12, 12, generator=generator).triu(1)
    change = {
        name: rr.relative(x @ m, x[:30] @ m)
        for name, m in (("isometry", -3 * turn), ("shear", shear))
    }
    gaps = {name: (r - rr.relative(x, x[:30])).abs() for name, r in change.items()}
    return Measured(
        values={"isometry": gaps["isometry"].max()}, null={"shear": gaps["shear"].mean()}, n=200
    )


@claim(
    says="A decoder reads the encoder of another training run as well as its own, when"
    " both speak through anchors",
    where="abstract; section 5 (zero-shot model stitching)",
    read="full text",
    tier="small",
    subject="MNIST classifiers of four seeds",
    kind="miniature",
    n="4 networks",
    expect="stitched >= native - 0.03 and native > 0.9 and absolute < 0.2 and shuffled < 0.2",
    direction="stitched > 2 * absolute and stitched > 2 * shuffled",
    null={
        "absolute": "the same stitching of nets trained without anchors",
        "shuffled": "the other net's anchors in another order",
    },
    thresholds="0.03, 0.9 and 0.2: the ledger's; chance is 0.1",
)
def a_stranger_can_be_read(seed: int) -> Measured:
    """Four MLPs with anchors and four without, alike in all but their seed; every encoder with
    every other's decoder.

    The anchors are training pictures, encoded anew at every step. Accuracy on test pictures.
    """
    mnist = data("mnist")
    x, y = small_nets.ready(mnist.train, TRAIN, seed)
    anchors, test = x[:ANCHORS], small_nets.ready(mnist.test, TEST, seed)
    order = torch.randperm(ANCHORS, generator=torch.Generator().manual_seed(seed))
    seeds = [1000 * seed + i for i in range(NETS)]
    with_anchors = [
        small_nets.train(lambda: _net(anchors), x, y, seed=s, steps=STEPS) for s in seeds
    ]
    without = [small_nets.train(lambda: _net(None), x, y, seed=s, steps=STEPS) for s in seeds]

    def across(nets: list[rr.Stitched], told: Tensor | None) -> np.ndarray:
        """Accuracy (encoder, decoder)."""
        pairs = [rr.Stitched(a.encoder, b.decoder, told).eval() for a, b in product(nets, nets)]
        return np.array([small_nets.accuracy(net, *test) for net in pairs]).reshape(NETS, NETS)

    own = np.eye(NETS, dtype=bool)
    relative, absolute, shuffled = (
        across(with_anchors, anchors),
        across(without, None),
        across(with_anchors, anchors[order]),
    )
    other = relative[~own]
    bars = [relative[own], other, absolute[own], absolute[~own], shuffled[~own]]
    names = [
        "relative, own decoder",
        "relative, stitched",
        "absolute, own decoder",
        "absolute, stitched",
        "shuffled anchors",
    ]
    return Measured(
        values={
            "native": relative[own].mean(),
            "stitched": other.mean(),
            "absolute_native": absolute[own].mean(),
        },
        null={"absolute": absolute[~own].mean(), "shuffled": shuffled[~own].mean()},
        n=NETS,
        figure=xr.DataArray([b.mean() for b in bars], {"nets": names}, ["nets"], name="accuracy"),
        note=f"Twelve pairs of nets: {other.min():.3f} to {other.max():.3f}. Chance is 0.1.",
    )


def _net(anchors: Tensor | None) -> rr.Stitched:
    """An MLP of two hidden layers of 128, and a decoder of one that reads the embedding or its
    cosines."""
    width = 128 if anchors is None else len(anchors)
    decoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))
    return rr.Stitched(small_nets.mlp(128, 2)[:-1], decoder, anchors)


@claim(
    says="Word spaces that were made in unlike ways say the same of the same words, "
    "once told by parallel anchors",
    where="abstract; section 4.1 (word embeddings, MRR)",
    read="full text",
    tier="small",
    subject="glove, minilm",
    kind="real",
    n="3,000 words",
    expect="mrr > 10 * absolute and mrr > 10 * shuffled",
    direction="mrr > 2 * absolute and mrr > 2 * shuffled",
    null={
        "absolute": "the spaces themselves, on their principal axes or as they are, whichever"
        " is better",
        "shuffled": "anchors that are not parallel",
    },
    thresholds="10 and 2: the ledger's",
)
def words_find_themselves(seed: int) -> Measured:
    """Each of 4,000 frequent words is looked up by its GloVe vector among MiniLM's, and the other
    way round.

    The paper compares FastText and Word2Vec, both learned from neighbouring words and of 300
    dimensions. These two are less alike: GloVe has 50, MiniLM reads the word's letters as a text.
    mrr is the mean of both ways; anchors take no part.
    """
    glove, lm = data("glove").train, models.load("minilm")
    words = [word for word in glove.words[:12_000] if word.isalpha() and len(word) > 2][:WORDS]
    one = torch.tensor(np.stack([glove[word] for word in words])).float()
    two = torch.cat([rr.embed(lm, words[i : i + 256]) for i in range(0, WORDS, 256)])
    found, noise = [], []
    for draw in range(DRAWS):
        picked = rr.choose(one, ANCHORS, seed=1000 * seed + draw)
        rest = torch.ones(WORDS, dtype=torch.bool).index_fill(0, picked, False)
        mixed = picked[torch.randperm(ANCHORS, generator=torch.Generator().manual_seed(draw))]
        a, b, c = (
            rr.relative(one[rest], one[picked]),
            rr.relative(two[rest], two[picked]),
            rr.relative(two[rest], two[mixed]),
        )
        found.append((_mrr(a, b), _mrr(b, a)))
        noise.append((_mrr(a, c) + _mrr(c, a)) / 2)
    forth, back = np.mean(found, axis=0)
    means = np.mean(found, axis=1)
    absolute = [
        (_mrr(a, b) + _mrr(b, a)) / 2 for a, b in (_plain(one, two), (_axes(one), _axes(two)))
    ]
    bars = [forth, back, max(absolute), np.mean(noise)]
    names = ["GloVe to MiniLM", "MiniLM to GloVe", "absolute", "shuffled"]
    return Measured(
        values={"mrr": means.mean(), "glove_to_minilm": forth, "minilm_to_glove": back},
        null={"absolute": max(absolute), "shuffled": np.mean(noise)},
        n=WORDS - ANCHORS,
        figure=xr.DataArray(bars, {"spaces": names}, ["spaces"], name="mean reciprocal rank"),
        note=f"{DRAWS} draws of anchors: {means.min():.3f} to {means.max():.3f}.",
    )


def _mrr(one: Tensor, two: Tensor) -> float:
    return rr.agreement(one, two)["mrr"].mean().item()


def _plain(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are, the shorter one filled up with zeros."""
    return nn.functional.pad(one, (0, two.shape[1] - one.shape[1])), two


def _axes(x: Tensor, count: int = 50) -> Tensor:
    """On its own first principal axes."""
    centred = x - x.mean(dim=0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:count].T
