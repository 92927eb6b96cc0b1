"""From Tokens to Thoughts: How LLMs and Humans Trade Compression for Meaning.

Shani, Jurafsky, LeCun and Shwartz-Ziv, 2025. arXiv:2505.17117.
Claim: token embeddings form the broad categories that people have, hardly tell which members are
    typical of them, and compress more than people do.
Methods: embeddings.human_categories
Protocol: the encoders and decoders of the paper; the categories and typicality ratings of Rosch
    and of McCloskey and Glucksberg (1,049 items in 34 categories); L over all beta and numbers of
    clusters, Gaussian kinds of equal covariance as the null.

The paper's categories are those of Rosch and of McCloskey and Glucksberg. Here WordNet's kinds
stand in for them: frequent words whose first sense is of one of 21 everyday kinds. For typicality,
short lists that we typed from the best known to the least stand in for the published ratings: they
are rough, and only their order is used. Authors are those of the first version; section numbers and
numbers quoted are of the revised one (ICLR 2026), which Soffer joined.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.embeddings import human_categories as hc
from stratoscope.embeddings import relative_representations
from stratoscope.lab import data

KINDS = (
    "bird fish insect reptile edible_fruit vegetable tree beverage furniture vehicle weapon tool "
    "clothing "
    "musical_instrument building sport disease chromatic_color metallic_element relative fabric"
).split()
FREQUENT, SHUFFLES = 30_000, 200  # the most frequent words of GloVe's; shuffles of the lists
BETAS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
# what people name first when asked for the kind, and last: typed by us, not the published ratings
TYPICAL = {
    "bird": "robin sparrow bluejay canary pigeon lark eagle crow hawk parrot owl goose "
    "duck peacock chicken turkey ostrich penguin",
    "fruit": "apple orange banana peach pear grape strawberry plum cherry pineapple lemon "
    "melon mango fig coconut pumpkin olive",
    "vegetable": "carrot pea spinach broccoli corn lettuce cabbage celery cucumber beet tomato "
    "potato onion mushroom pumpkin garlic rice",
    "furniture": "chair sofa table desk bed dresser bookcase cabinet bench lamp stool piano "
    "mirror rug pillow stove clock vase",
    "vehicle": "car truck bus taxi van motorcycle train bicycle airplane boat ship tractor "
    "wagon canoe sled horse rocket elevator",
    "weapon": "gun pistol rifle knife sword dagger bomb grenade spear cannon bow club "
    "missile axe whip hammer brick rope",
    "clothing": "shirt pants dress skirt jacket sweater coat suit socks shorts shoes hat "
    "gloves belt scarf tie watch necklace",
    "sport": "football baseball basketball tennis soccer hockey swimming volleyball golf boxing "
    "skiing wrestling fishing hunting chess dancing",
    "tool": "hammer saw screwdriver drill wrench pliers axe chisel shovel ladder ruler knife "
    "scissors rope tape glue needle crane",
}


@claim(
    says="Complexity is the information that categories hold of their members, "
    "distortion the variance they leave",
    where="section 4.2 (the objective L)",
    tier="identity",
    subject="planted heaps of points",
    expect="ami > 0.999 and one < 0.000001 and singles < 0.000001 and abs(shuffled) < 0.2",
    null={"shuffled": "the labels of the heaps, shuffled"},
)
def the_objective_has_its_limits(seed: int) -> Measured:
    """k-means on heaps that lie far apart; and how far L is from beta for one cluster, and from
    log2 n for singletons."""
    generator, labels = np.random.default_rng(seed), np.arange(4).repeat(16)
    e = hc.scaled(8 * np.eye(4)[labels] + 0.3 * generator.normal(size=(64, 4)))
    one, singles = (
        hc.objective(e, part, beta=3.0) for part in (np.zeros(64, dtype=int), np.arange(64))
    )
    found = hc.clusters(e, 4, seed=seed)
    return Measured(
        values={
            "ami": hc.shared(found, labels),
            "one": abs(one - 3.0),
            "singles": abs(singles - 6.0),
        },
        null={"shuffled": hc.shared(found, generator.permutation(labels))},
        n=64,
    )


@claim(
    says="Clusters of static embeddings agree with human categories far above chance",
    where="abstract; section 5.1 (AMI)",
    read="full text",
    tier="small",
    subject="smollm2",
    kind="real",
    n="400 words",
    expect="ami > 0.25 and ami > 10 * abs(shuffled)",
    direction="ami > 3 * abs(shuffled)",
    null={"shuffled": "human categories shuffled among the words"},
    thresholds="0.25, 10 and 3: the ledger's",
)
def smollm2_has_broad_categories(seed: int) -> Measured:
    """k-means of SmolLM2's token embeddings (the mean over a word's tokens), as many clusters as
    kinds, against WordNet."""
    return _agreement(_smollm2, seed)


@claim(
    says="Clusters of static embeddings agree with human categories far above chance",
    where="abstract; section 5.1 (AMI)",
    read="full text",
    tier="small",
    subject="glove",
    kind="real",
    n="400 words",
    expect="ami > 0.25 and ami > 10 * abs(shuffled)",
    direction="ami > 3 * abs(shuffled)",
    null={"shuffled": "human categories shuffled among the words"},
    thresholds="0.25, 10 and 3: the ledger's",
)
def glove_has_broad_categories(seed: int) -> Measured:
    """The same for GloVe's word vectors of 50 numbers."""
    return _agreement(_glove, seed)


@claim(
    says="Embeddings tell which kind a word is of, but hardly how typical it is of its kind",
    where="abstract; section 5.2 (typicality)",
    read="full text",
    tier="small",
    subject="smollm2",
    kind="real",
    n="9 kinds",
    valid="centroid > shuffled",
    expect="centroid <= 0.4 and name <= 0.4 and member > 0.8",
    direction="centroid <= 0.6 and name <= 0.6 and member > 0.6",
    null={
        "shuffled": "the lists shuffled: the mean rank correlation that 95 % of the shuffles "
        "stay below"
    },
    thresholds="0.4, 0.6 and 0.8: the ledger's; no null opposes a low correlation, so that "
    "the validity asks whether the typed order, which is ours and no published "
    "rating, is seen at all",
)
def smollm2_hardly_knows_typicality(seed: int) -> Measured:
    """Rank correlation of typed order and cosine, in each of nine kinds, then the mean: to the
    others' mean, and to the name.

    member: how often a word is nearer to the mean of its own kind than to that of another.

    The claim asks for low numbers, which a bad list gives as well: an order without any sense would
    pass, and the null does not oppose this. It shows that the typed order has some sense: on seed 0
    0.39 and 0.32 are far above the 0.14 of shuffled lists. That 0.39 is below 0.40 is chance: its
    interval runs from 0.15 to 0.61. The paper asks for the name alone, and finds less than 0.15 for
    most decoders.
    """
    return _typicality(_smollm2, seed)


@claim(
    says="Embeddings tell which kind a word is of, but hardly how typical it is of its kind",
    where="abstract; section 5.2 (typicality)",
    read="full text",
    tier="small",
    subject="glove",
    kind="real",
    n="9 kinds",
    valid="centroid > shuffled",
    expect="centroid <= 0.4 and name <= 0.4 and member > 0.8",
    direction="centroid <= 0.6 and name <= 0.6 and member > 0.6",
    null={
        "shuffled": "the lists shuffled: the mean rank correlation that 95 % of the shuffles "
        "stay below"
    },
    thresholds="0.4, 0.6 and 0.8: the ledger's; no null opposes a low correlation, so that "
    "the validity asks whether the typed order, which is ours and no published "
    "rating, is seen at all",
)
def glove_hardly_knows_typicality(seed: int) -> Measured:
    """The same for GloVe's word vectors: 0.41 and 0.20 on seed 0, as near to the threshold from its
    other side."""
    return _typicality(_glove, seed)


@claim(
    says="By the objective L, clusters of embeddings are more compressed than human categories",
    where="abstract; section 5.3 (the trade-off, L)",
    read="full text",
    tier="small",
    subject="smollm2",
    kind="real",
    n="400 words",
    expect="clusters < human and clusters_complexity < human_complexity and human < shuffled",
    direction="clusters < human",
    null={"shuffled": "human categories shuffled among the words, which keeps their complexity"},
)
def smollm2_compresses_more(seed: int) -> Measured:
    """L at beta = 1 of as many k-means clusters as kinds, and of the kinds, in a space scaled to
    total variance 1.

    Distortion alone would be no finding, as k-means minimises it: complexity is asked to be lower
    as well. But complexity is the entropy of the sizes and no more: on seed 0, 3.79 bits against
    4.13 (of at most 4.39) says that k-means cut this space into clusters of less equal size, which
    a space with a few outliers brings about too.
    """
    return _compression(_smollm2, seed)


@claim(
    says="By the objective L, clusters of embeddings are more compressed than human categories",
    where="abstract; section 5.3 (the trade-off, L)",
    read="full text",
    tier="small",
    subject="glove",
    kind="real",
    n="400 words",
    expect="clusters < human and clusters_complexity < human_complexity and human < shuffled",
    direction="clusters < human",
    null={"shuffled": "human categories shuffled among the words, which keeps their complexity"},
)
def glove_compresses_more(seed: int) -> Measured:
    """The same for GloVe's word vectors."""
    return _compression(_glove, seed)


def _agreement(embed, seed: int) -> Measured:
    words, labels = _words()
    found = hc.compare(embed(words), labels, seed=seed)
    ami, null = found["ami"], found["null_ami"]
    return Measured(
        values={"ami": ami.mean(), "kinds": len(KINDS)},
        null={"shuffled": null.mean()},
        n=len(words),
        figure=xr.DataArray(
            [ami.mean(), null.mean()],
            {"labels": ["kinds", "shuffled"]},
            ["labels"],
            name="adjusted mutual information",
        ),
        note=f"Five starts of k-means: {ami.min():.3f} to {ami.max():.3f}.",
    )


def _typicality(embed, seed: int) -> Measured:
    lists = {kind: text.split() for kind, text in TYPICAL.items()}
    words, names = [word for listed in lists.values() for word in listed], list(lists)
    labels, generator = (
        np.repeat(np.arange(len(names)), [len(listed) for listed in lists.values()]),
        np.random.default_rng(seed),
    )
    e = embed(words + names)
    e = e - e[: len(words)].mean(axis=0)
    e, called = e[: len(words)], e[len(words) :]
    own = hc.typicality(e, labels)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (e, called)]
    named = (unit[0] * unit[1][labels]).sum(axis=1)
    others = [hc.typicality(e, labels, np.full(len(e), k)) for k in range(len(names))]
    beaten = np.array([own > other for other in others]).T[labels[:, None] != np.arange(len(names))]

    def per_kind(near: np.ndarray) -> np.ndarray:
        """Rank correlation with the typed order, whose first word is the most typical."""
        return np.array(
            [
                spearmanr(near[labels == k], -np.arange((labels == k).sum())).statistic
                for k in range(len(names))
            ]
        )

    centroid, name = per_kind(own), per_kind(named)
    shuffled = [per_kind(own[_within(labels, generator)]).mean() for _ in range(SHUFFLES)]
    return Measured(
        units={"centroid": centroid, "name": name},
        values={"member": beaten.mean()},
        null={"shuffled": np.quantile(shuffled, 0.95)},
        n=len(names),
        figure=xr.DataArray(
            [centroid, name],
            {"near": ["to the others", "to the name"], "kind": names},
            ["near", "kind"],
            name="rank correlation",
        ),
        note="Ratings are not at hand: the order is ours.",
    )


def _compression(embed, seed: int) -> Measured:
    words, labels = _words()
    e = embed(words)
    found = {name: values.mean() for name, values in hc.compare(e, labels, seed=seed).items()}
    curves = [
        [found[f"{who}complexity"] + b * found[f"{who}distortion"] for b in BETAS]
        for who in ("", "human_", "null_")
    ]
    return Measured(
        values={
            "clusters": found["objective"],
            "clusters_complexity": found["complexity"],
            "clusters_distortion": found["distortion"],
            "human": found["human_objective"],
            "human_complexity": found["human_complexity"],
            "human_distortion": found["human_distortion"],
        },
        null={"shuffled": found["null_objective"]},
        n=len(words),
        figure=xr.DataArray(
            curves,
            {"categories": ["clusters", "human", "shuffled"], "beta": list(BETAS)},
            ["categories", "beta"],
            name="L",
        ),
    )


def _within(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """An order of the words in which each stays in its kind."""
    return np.lexsort((generator.random(len(labels)), labels))


@cache
def _words() -> tuple[list[str], np.ndarray]:
    """Frequent words whose first sense as a noun is of exactly one of the kinds, and of which."""
    nouns = {synset.name: synset for synset in data("wordnet").train if synset.part == "n"}
    frequent = data("glove").train.words[:FREQUENT]
    words, labels = [], []
    for word in frequent:
        if f"{word}.n.01" not in nouns or word not in nouns[f"{word}.n.01"].lemmas:
            continue  # no noun, or a name
        above, wave = set(), [f"{word}.n.01"]
        while wave:
            name = wave.pop()
            if name in nouns and name not in above:
                above.add(name)
                wave += nouns[name].hypernyms
        found = [
            i
            for i, kind in enumerate(KINDS)
            if f"{kind}.n.01" in above and f"{word}.n.01" != f"{kind}.n.01"
        ]
        if len(found) == 1:
            words.append(word)
            labels.append(found[0])
    return words, np.array(labels)


def _glove(words: list[str]) -> np.ndarray:
    vectors = data("glove").train
    return np.stack([vectors[word] for word in words])


def _smollm2(words: list[str]) -> np.ndarray:
    """The mean of the word's token embeddings, as the word stands after a space."""
    lm, texts = models.load("smollm2"), [f" {word}" for word in words]
    parts = [
        relative_representations.embed(lm, texts[i : i + 256], site="layers.0.resid_pre")
        for i in range(0, len(texts), 256)
    ]
    return torch.cat(parts).numpy()
