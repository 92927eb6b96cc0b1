"""Relative representations enable zero-shot latent space communication.

Moschella, Maiorca, Fumero, Norelli, Locatello and Rodolà, 2022 (ICLR 2023). arXiv:2209.15430.
Claim: embeddings told by their cosines with shared anchors hardly depend on how a network was
    initialised, so that a decoder reads another network's encoder without training, and the spaces
    of unlike models become comparable.
Methods: embeddings.relative_representations
Protocol: the paper's autoencoders and classifiers on MNIST, CIFAR-10 and -100 over ten seeds and
    several architectures, FastText and Word2Vec of 300 dimensions on the words they share, 300
    parallel anchors; a least-squares map on the same anchors as the upper reference.
What would change our mind: pairs of networks whose decoders read each other no better than an
    untrained encoder, or than with the anchors in another order. Whether anchors are the best use
    of 300 known pairs is another question, judged apart: a least-squares map that loses more than
    0.03 against them in most pairs would make us think so.
What the authors may object: their networks are larger and trained longer, on colour pictures too;
    their encoders of unlike architecture were trained by others and frozen, ours learn with the
    anchors; their word spaces are both of 300 dimensions and learned from neighbouring words; a
    least-squares map is no rival of theirs, as it must be fitted again for each pair.

Anchors are drawn uniformly, 300 of them, as many as the paper takes for words (section 4.1). The
independent unit is a pair of networks, and none is in two pairs. An earlier form crossed four
networks to twelve pairs and had no rival but chance; here stand an encoder that has learned
nothing, what the class alone would tell, and the maps that the same anchors fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.embeddings import relative_representations as rr
from stratoscope.embeddings import stitching as st
from stratoscope.lab import data, small_nets
from stratoscope.maths.resample import interval
from stratoscope.papers import _stitched as stitched
from stratoscope.papers._stitched import ANCHORS, Build

# pairs of classifiers, and of autoencoders; test pictures
READERS, DRAWERS, TEST = 12, 6, 2_000
WORDS, DRAWS, NULLS = 4_000, 5, 20


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
    subject="MNIST classifiers (MLPs), twelve pairs of seeds",
    kind="miniature",
    n="12 pairs of networks",
    valid="native_low > 0.9 and absolute_native_low > 0.9",
    expect="gap_high <= 0.03 and absolute_high < 0.2 and shuffled_high < 0.2 and "
    "untrained_high < stitched_low",
    direction="stitched_low > 2 * absolute_high and stitched_low > 2 * shuffled_high and "
    "untrained_high < stitched_low",
    we_add="through anchors as well as through the better of two least-squares maps that the same "
    "anchors fit",
    we_expect="over_map_low >= -0.03",
    null={
        "absolute": "the same stitching of nets trained without anchors",
        "shuffled": "the other net's anchors in another order",
        "untrained": "an encoder that has learned nothing, through anchors, with the same decoder",
    },
    thresholds="0.03, 0.9 and 0.2: the ledger's; chance is 0.1; 0.03 against a map: the same",
)
def a_stranger_can_be_read(seed: int) -> Measured:
    """Twelve pairs of MLPs with anchors and twelve without, alike in all but their seed; each net's
    encoder with its partner's decoder, both ways. gap: what the partner loses against the decoder's
    own encoder. Anchors are training pictures. Accuracy on test pictures. Twelve, as of six pairs
    (a pilot, seed 1000) the interval of what is chance reached 0.24."""
    return _classifiers(seed, stitched.mlp, stitched.mlp)


@claim(
    says="Encoders of another architecture can be read through anchors as well",
    where="abstract (various architectures); section 5.2 and 5.3, with frozen encoders",
    read="full text",
    tier="small",
    subject="MNIST classifiers, twelve pairs of an MLP and a CNN",
    kind="miniature",
    n="12 pairs of networks",
    valid="native_low > 0.9 and absolute_native_low > 0.9",
    expect="stitched_low >= 0.5 and absolute_high < 0.2 and shuffled_high < 0.2 and "
    "untrained_high < stitched_low",
    direction="stitched_low > 2 * absolute_high and stitched_low > 2 * shuffled_high and "
    "untrained_high < stitched_low",
    we_add="through anchors as well as through the better of two least-squares maps that the same "
    "anchors fit",
    we_expect="over_map_low >= -0.03",
    null={
        "absolute": "the same stitching of nets trained without anchors",
        "shuffled": "the other net's anchors in another order",
        "untrained": "an encoder that has learned nothing, through anchors, with the same decoder",
    },
    thresholds="0.5: ours, five times chance, the least that would be of use; 0.9 and 0.2: the "
    "ledger's; 0.03 against a map: as between nets of one kind",
)
def another_architecture_can_be_read(seed: int) -> Measured:
    """The same for pairs of an MLP and a CNN with embeddings of equal width, both ways."""
    return _classifiers(seed, stitched.mlp, stitched.cnn)


@claim(
    says="An autoencoder's decoder draws the pictures that another training run's encoder saw, "
    "through anchors, and draws something else without",
    where="section 5.1 (image reconstruction), table 3, its numbers from memory and not checked; "
    "networks: the authors' code, modules/rel_ae.py and blocks.py",
    read="authors' code",
    tier="small",
    subject="convolutional autoencoders of MNIST, six pairs of seeds",
    kind="miniature",
    n="6 pairs of networks",
    valid="native_high < 0.5 and absolute_native_high < 0.5",
    expect="ratio_high <= 3 and stitched_high < class_alone and stitched_high < absolute_low and "
    "stitched_high < shuffled_low and stitched_high < untrained_low",
    direction="stitched_high < absolute_low and stitched_high < shuffled_low and "
    "stitched_high < untrained_low",
    we_add="through anchors as well as through the better of two least-squares maps that the same "
    "anchors fit",
    we_expect="over_map_low >= -0.03",
    null={
        "absolute": "the same stitching of nets trained without anchors",
        "shuffled": "the other net's anchors in another order",
        "untrained": "an encoder that has learned nothing, through anchors, with the same decoder",
        "class_alone": "the mean picture of the right class: no more than a class came across",
    },
    thresholds="3 times its own error: the paper's 2.4 on MNIST, rounded up; 0.5: half of what the "
    "mean picture leaves; 0.03 against a map: as for classifiers",
    found_there={"ratio": 2.4},
)
def another_encoder_s_pictures_are_drawn(seed: int) -> Measured:
    """Squared error on test pictures, in shares of what the mean picture leaves; ratio: stitched
    over native. Differences from the authors' code: fewer channels and an embedding of 64 instead
    of 1,024; plain squared error without a fitted deviation, and no tanh, as pixels have mean 0;
    transposed convolutions of stride 2; 400 steps of 64 pictures."""
    test, y = small_nets.ready(data("mnist").test, TEST, seed)
    whole = _spread(test)

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            parts = [(net(part) - part).square().sum() for part in test.split(500)]
        return float(torch.stack(parts).sum() / whole)

    options = {"batch": 64, "rate": 3e-3, "loss": nn.functional.mse_loss, "redraw": True}
    units = stitched.pairs(
        seed, DRAWERS, (stitched.autoencoder, stitched.autoencoder), error, **options
    )
    units["ratio"] = units["stitched"] / units["native"]
    alone = sum(_spread(test[y == each]) for each in y.unique()) / whole
    return stitched.measured(
        units, -1, "squared error, in shares of the mean picture's", class_alone=alone
    )


def _classifiers(seed: int, *kinds: Build) -> Measured:
    test = small_nets.ready(data("mnist").test, TEST, seed)
    units = stitched.pairs(seed, READERS, kinds, lambda net: small_nets.accuracy(net, *test))
    units["gap"] = units["native"] - units["stitched"]
    return stitched.measured(units, 1, "accuracy")


def _spread(x: Tensor) -> float:
    return float((x - x.mean(dim=0)).square().sum())


@claim(
    says="Word spaces that were made in unlike ways say the same of the same words, "
    "once told by parallel anchors",
    where="abstract; section 4.1 (word embeddings), table 1, its number from memory, not checked",
    read="full text",
    tier="small",
    subject="glove, minilm",
    kind="real",
    n="3,000 words",
    expect="mrr_low > 10 * absolute_high and mrr_low > 10 * shuffled_bound and "
    "mrr_low > 10 * neighbours_bound",
    direction="mrr_low > 2 * absolute_high and mrr_low > 2 * shuffled_bound and "
    "mrr_low > 2 * neighbours_bound",
    we_add="through anchors as well as through the better of two least-squares maps that the same "
    "anchors fit",
    we_expect="over_map_low >= 0",
    null={
        "absolute": "the spaces themselves, as they are or on their principal axes, whichever is "
        "better",
        "shuffled": "anchors in another order in one of the spaces, 20 draws",
        "neighbours": "in one space the next word by frequency for each anchor, 20 draws: what "
        "frequency alone tells",
    },
    thresholds="10 and 2: the ledger's; 0 against a map: no worse",
    found_there={"mrr": 0.94},
)
def words_find_themselves(seed: int) -> Measured:
    """Each of 4,000 frequent words is looked up by its GloVe vector among MiniLM's, and the other
    way round. The paper compares FastText and Word2Vec, both learned from neighbouring words and of
    300 dimensions. These two are less alike: GloVe has 50, MiniLM reads the word's letters as a
    text. mrr is the mean of both ways over five draws of anchors; anchors take no part."""
    glove, lm = data("glove").train, models.load("minilm")
    words = [word for word in glove.words[:12_000] if word.isalpha() and len(word) > 2][:WORDS]
    one = torch.tensor(np.stack([glove[word] for word in words])).float()
    two = torch.cat([rr.embed(lm, words[i : i + 256]) for i in range(0, WORDS, 256)])
    return _words(one, two, seed)


@claim(
    says="Word spaces that were made in unlike ways say the same of the same words, "
    "once told by parallel anchors",
    where="abstract; section 4.1 (word embeddings), table 1, its number from memory, not checked",
    read="full text",
    tier="small",
    subject="smollm2, gemma3-270m",
    kind="real",
    n="3,000 words",
    expect="mrr_low > 10 * absolute_high and mrr_low > 10 * shuffled_bound and "
    "mrr_low > 10 * neighbours_bound",
    direction="mrr_low > 2 * absolute_high and mrr_low > 2 * shuffled_bound and "
    "mrr_low > 2 * neighbours_bound",
    we_add="through anchors as well as through the better of two least-squares maps that the same "
    "anchors fit",
    we_expect="over_map_low >= 0",
    null={
        "absolute": "the spaces themselves, as they are or on their principal axes, whichever is "
        "better",
        "shuffled": "anchors in another order in one of the spaces, 20 draws",
        "neighbours": "in one space the next word by frequency for each anchor, 20 draws: what "
        "frequency alone tells",
    },
    thresholds="10 and 2: the ledger's; 0 against a map: no worse",
    found_there={"mrr": 0.94},
)
def tokens_find_themselves(seed: int) -> Measured:
    """The same for the input embeddings of two language models (576 and 640 dimensions, of two
    makers), of frequent words that are one token, with its space, of both."""
    lms = [models.load(name) for name in ("smollm2", "gemma3-270m")]
    tables = [lm.model.get_input_embeddings().weight.detach().float() for lm in lms]
    rows = []
    for word in data("glove").train.words:
        ids = [lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for lm in lms]
        if word.isalpha() and len(word) > 2 and len(ids[0]) == len(ids[1]) == 1:
            rows.append((ids[0][0], ids[1][0]))
        if len(rows) == WORDS:
            break
    one, two = (table[list(row)] for table, row in zip(tables, zip(*rows)))
    return _words(one, two, seed)


def _words(one: Tensor, two: Tensor, seed: int) -> Measured:
    """Rows are the same words, sorted by frequency; anchors have even places."""
    even = one[: len(one) - 1 : 2]
    drawn = [2 * rr.choose(even, ANCHORS, seed=1000 * seed + draw) for draw in range(NULLS)]

    def right(how: str) -> np.ndarray:
        rows = [st.found_again(one, two, picked, how=how) for picked in drawn[:DRAWS]]
        mean = torch.stack(rows).nanmean(dim=0).numpy()
        return mean[~np.isnan(mean)]  # the others were anchors in every draw

    def wrong(change: Callable[[Tensor], Tensor]) -> list[float]:
        rows = [st.found_again(one, two, picked, parallel=change(picked)) for picked in drawn]
        return [row.nanmean().item() for row in rows]

    every = {how: right(how) for how in ("relative", "affine", "orthogonal", "absolute", "axes")}
    best, plain = (
        max(pair, key=lambda how: every[how].mean())
        for pair in (("affine", "orthogonal"), ("absolute", "axes"))
    )
    null = {"shuffled": wrong(lambda x: x.roll(1)), "neighbours": wrong(lambda x: x + 1)}
    rows = {"mrr": every["relative"], "affine": every["affine"], "orthogonal": every["orthogonal"]}
    rows |= {"over_map": every["relative"] - every[best], "absolute": every[plain]}
    spans = {name: interval(row) for name, row in rows.items()}
    bars = {name: each.value for name, each in spans.items() if name != "over_map"}
    bars |= {name: float(np.mean(row)) for name, row in null.items()}
    return Measured(
        values={name: each.value for name, each in spans.items() if name != "absolute"},
        null={"absolute": spans["absolute"].value, **null},
        interval={name: (each.low, each.high) for name, each in spans.items()},
        n=spans["mrr"].n,
        figure=xr.DataArray(
            list(bars.values()),
            {"way": list(bars)},
            ["way"],
            name="mean reciprocal rank",
            attrs={"title": "how well words find themselves in the other space"},
        ),
        note=f"The better map: {best}; without any: {plain}.",
    )
