"""Word class representations spontaneously emerge in a deep neural network trained on next word
prediction.

Surendra, Schilling, Stoewer, Maier and Krauss, 2023. arXiv:2302.07588.
Claim: a network that learns to predict the next word clusters nine-word inputs by the class of the
    tenth word, which it does not see and whose class it was never told; the deeper the layer, the
    more.
Methods: layers.discrimination
Protocol: the paper's recurrent network trained on its corpus with spaCy's tags, five training
    seeds; GDV of nine-word inputs by layer, before and after training.
What would change our mind: five networks whose last layer is no further apart than the embedding of
    the ninth word, or than with fresh weights.
What the authors may object: their network is recurrent and reads nine word vectors side by side,
    ours are mostly transformers that read tokens; classes here are lists and WordNet's, not a
    tagger's; our bar, the ninth word alone, is higher than theirs.

Word classes come from no tagger: five closed classes are short lists of words that belong to one
class, nearly always; the words of the four open ones are in one part of speech of WordNet only,
whatever inflection they are taken for. Windows are ten words of Wikipedia with nothing but a space
between them, so that the tenth is what comes next. All classes have as many.

The claim is about training: of the miniature five networks are trained, and they are the units. Of
a real model there is one, and its intervals are over windows.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import data, make, planted
from stratoscope.lab.miniatures import _text, tiny_lstm
from stratoscope.lab.miniatures.tiny_lstm import TinyLSTM
from stratoscope.layers import discrimination
from stratoscope.maths.resample import interval
from stratoscope.models import LM

# windows of a class, and how many of them may have the same tenth word: a fifth
EACH, MOST = 80, 16
NETS, TOLD = 5, ("shallow", "deep", "gain")
CLOSED = {
    "determiner": "the a an every its their our my your",
    "preposition": "of from with at into during among between upon toward towards for by except",
    "pronoun": "he she they we it him them us me himself herself itself themselves",
    "conjunction": "and or but nor because although though while if unless whether whereas",
    "auxiliary": "is are was were am could would should can may must might shall",
}
OPEN = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
FORMS = (
    ("s", "", "nv"),
    ("es", "", "nv"),
    ("ies", "y", "nv"),
    ("ed", "e", "v"),
    ("ed", "", "v"),
    ("ied", "y", "v"),
)
# WordNet's adjectives include participles and determiners, its adverbs particles and prepositions:
# take those that show it
ENDINGS = {
    "adjective": ("al", "ic", "ous", "ful", "ive", "able", "ible", "less", "ant", "ent", "ary"),
    "adverb": ("ly",),
}
HELD_OUT = "The text is enwik8's test part, which the miniatures never saw."
States = list[Tensor]  # (example, width of the layer) for each depth, the embedding first
# nine words each, and the classes of the words that follow
Windows = tuple[tuple[str, ...], tuple[str, ...]]


@claim(
    says="The measure is -1 for two classes apart, 0 for one heap, and falls at the "
    "layer that says which word comes",
    where="methods (GDV, after Schilling et al. 2021)",
    tier="identity",
    subject="planted.suppression",
    expect="abs(apart + 1) < 1e-6 and abs(heap) < 0.02 and before == 0 and after < 5 * shuffled",
    null={
        "heap": "normal noise with two labels",
        "shuffled": "the least of 100 label shuffles on the planted model",
    },
)
def it_falls_where_the_word_is_computed(seed: int) -> Measured:
    """The last word of every prompt is the same; layer 0 copies to it the name that the model says
    next."""
    p = planted.suppression()
    some = [v for v in p.variants(240, seed=seed) if v.answer in ("Finn", "Hana")]
    lm = models.wrap(p.model, p.tokenizer)
    found = discrimination.measure(
        lm, [v.clean for v in some], labels=[v.answer for v in some], position=-1, seed=seed
    )
    generator, two = torch.Generator().manual_seed(seed), torch.arange(100) % 2
    return Measured(
        values={
            "apart": discrimination.generalized_discrimination(
                two[:, None] * torch.randn(1, 50, generator=generator), two
            ),
            "before": found.gdv.sel(depth=0),
            "after": found.gdv.sel(depth=1),
        },
        null={
            "heap": discrimination.generalized_discrimination(
                torch.randn(100, 50, generator=generator), two
            ),
            "shuffled": found.null_draws.sel(depth=1).min(),
        },
        n=len(some),
    )


@claim(
    says="Nine-word inputs cluster by the class of the tenth word, the more the deeper"
    " the layer, in a trained network only",
    where="abstract",
    read="abstract",
    tier="small",
    subject="tiny-lstm",
    kind="miniature",
    n="720 windows",
    expect="deep_high < untrained and deep_high < shuffled_floor and gain_low >= 0.02 and "
    "trend <= -0.5",
    direction="deep_high < untrained and deep_high < shuffled_floor and gain > 0",
    null={
        "shuffled": "labels shuffled, last layer",
        "untrained": "the least of any depth with fresh weights",
    },
    thresholds="0.02 and -0.5: the ledger's",
)
def a_recurrent_network_separates_classes(seed: int) -> Measured:
    """GDV of nine classes at the last token of the ninth word: `shallow` in the embedding, which is
    all that this word alone tells, `deep` in the last layer; trend: rank correlation of depth and
    GDV. The least possible is -0.75. ninth_alone is the last layer's GDV when the ninth word is all
    that is read; it is told, not judged.

    `nine_words` is nine word vectors side by side, where the ninth word is a ninth of what is
    compared. In the embedding here it is all, and equal ninth words are at distance 0, in a network
    with fresh weights too: a hard bar. On seed 0 this network separates as well when it reads the
    ninth word alone, so that no use of the other eight is shown."""
    net, tokenizer = tiny_lstm.load(make("tiny-lstm", seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blank = TinyLSTM(**net.config).eval()

    @torch.no_grad()
    def states(network: TinyLSTM, texts: tuple[str, ...]) -> States:
        rows = [network.layers(torch.tensor([tokenizer(text)["input_ids"]])) for text in texts]
        return [torch.stack([layer[0, -1] for layer in depth]) for depth in zip(*rows)]

    texts, kinds = _windows(seed)
    alone = states(net, _last_words(texts))
    nine = _side_by_side(net.embed.weight, tokenizer, texts)
    return _measured(states(net, texts), states(blank, texts), alone, nine, kinds, seed, HELD_OUT)


@claim(
    says="Nine-word inputs cluster by the class of the tenth word, the more the deeper"
    " the layer, in a trained network only",
    where="abstract",
    read="abstract",
    tier="small",
    subject="tiny-gpt-small, five training seeds",
    kind="miniature",
    n="5 networks",
    expect="deep_high < untrained_low and deep_high < shuffled_floor and gain_low >= 0.02 and "
    "trend_high <= -0.5",
    direction="deep_high < untrained_low and deep_high < shuffled_floor and gain > 0",
    null={
        "shuffled": "labels shuffled, last layer",
        "untrained": "the least of any depth with fresh weights",
    },
    thresholds="0.02 and -0.5: the ledger's",
)
def small_transformers_separate_classes(seed: int) -> Measured:
    """The same in the residual stream of five transformers that read the same text and differ in
    their training seed, 0 to 4 whatever the claim's seed, which draws the windows."""
    texts, kinds = _windows(seed)
    labels = _numbers(kinds)
    rows, blanks, shuffled = [], [], []
    for net in range(NETS):
        lm = models.load(make("tiny-gpt-small", seed=net))
        found = discrimination.by_depth(_stream(lm, texts), labels, draws=40, seed=seed)
        blank = discrimination.by_depth(_stream(_blank(lm, net), texts), labels, draws=0)["gdv"]
        rows.append(found["gdv"])
        blanks.append(blank)
        shuffled += found["null"][-1].tolist()
    gdv, bare = np.array(rows), np.array(blanks)
    untrained, depth = interval(bare.min(axis=1)), np.arange(gdv.shape[1])
    return Measured(
        values={"least_depth": gdv.mean(axis=0).argmin()},
        null={"shuffled": shuffled, "untrained": untrained.value},
        n=NETS,
        units={
            "shallow": gdv[:, 0],
            "deep": gdv[:, -1],
            "gain": gdv[:, 0] - gdv[:, -1],
            "trend": [spearmanr(depth, row).statistic for row in gdv],
        },
        interval={"untrained": (untrained.low, untrained.high)},
        figure=_lines(gdv.mean(axis=0), bare.mean(axis=0), np.full(len(depth), np.mean(shuffled))),
        note=HELD_OUT,
    )


@claim(
    says="Nine-word inputs cluster by the class of the tenth word, the more the deeper"
    " the layer, in a trained network only",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="720 windows",
    expect="deep_high < untrained and deep_high < shuffled_floor and gain_low >= 0.02 and "
    "trend <= -0.5",
    direction="deep_high < untrained and deep_high < shuffled_floor and gain > 0",
    null={
        "shuffled": "labels shuffled, last layer",
        "untrained": "the least of any depth with fresh weights",
    },
    thresholds="0.02 and -0.5: the ledger's",
)
def a_language_model_separates(lm: LM, seed: int) -> Measured:
    """The same in the residual stream of a language model; untrained: the same architecture with
    fresh weights. The interval is over windows."""
    texts, kinds = _windows(seed)
    nine = _side_by_side(lm.model.get_input_embeddings().weight, lm.tokenizer, texts)
    return _measured(
        _stream(lm, texts),
        _stream(_blank(lm, seed), texts),
        _stream(lm, _last_words(texts)),
        nine,
        kinds,
        seed,
        "The model may have read these articles in training.",
    )


def _stream(lm: LM, texts: tuple[str, ...]) -> States:
    return list(torch.cat(discrimination.stream(lm, list(texts), position=-1)).unbind(dim=1))


def _blank(lm: LM, seed: int) -> LM:
    """The same architecture with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.wrap(type(lm.model)(lm.model.config).eval(), lm.tokenizer)


def _numbers(kinds: tuple[str, ...]) -> Tensor:
    return torch.tensor(np.unique(kinds, return_inverse=True)[1])


@torch.no_grad()
def _side_by_side(embedding: Tensor, tokenizer: Any, texts: tuple[str, ...]) -> Tensor:
    """(example, 9 * dim): the embeddings of the nine words' last tokens, one after another."""
    ids = [
        [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in text.split()]
        for text in texts
    ]
    return embedding[torch.tensor(ids)].flatten(1)


def _measured(
    trained: States,
    blank: States,
    alone: States,
    nine: Tensor,
    kinds: tuple[str, ...],
    seed: int,
    note: str,
) -> Measured:
    labels = _numbers(kinds)
    found = discrimination.by_depth(trained, labels, draws=200, seed=seed)
    bare = discrimination.by_depth(blank, labels, draws=0)["gdv"]
    gdv, shuffled = found["gdv"], found["null"]
    shallow, deep = (
        discrimination.shares(discrimination.distances(trained[depth]), labels) for depth in (0, -1)
    )
    told = {name: interval(x) for name, x in zip(TOLD, (shallow, deep, shallow - deep))}
    return Measured(
        values={name: found.value for name, found in told.items()}
        | {
            "least": gdv.min(),
            "least_depth": gdv.argmin(),
            "trend": spearmanr(np.arange(len(gdv)), gdv).statistic,
            "untrained_deep": bare[-1],
            "nine_words": discrimination.generalized_discrimination(nine, labels),
            "ninth_alone": discrimination.generalized_discrimination(alone[-1], labels),
        },
        null={"shuffled": shuffled[-1], "untrained": bare.min()},
        n=len(kinds),
        interval={name: (found.low, found.high) for name, found in told.items()},
        figure=_lines(gdv, bare, shuffled.mean(axis=1)),
        note=f"{note} Intervals are over windows.",
    )


def _lines(gdv: np.ndarray, bare: np.ndarray, shuffled: np.ndarray) -> xr.DataArray:
    return xr.DataArray(
        [gdv, bare, shuffled],
        {"network": ["trained", "untrained", "labels shuffled"], "depth": np.arange(len(gdv))},
        ["network", "depth"],
        name="generalized discrimination value",
    )


# the windows and their classes --------------------------------------------------------------------


def _last_words(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f" {text.split()[-1]}" for text in texts)


@cache
def _windows(seed: int) -> Windows:
    """EACH windows of every class, drawn from all there are."""
    found = list(_all_windows())
    random.Random(seed).shuffle(found)
    taken: dict[str, list[str]] = defaultdict(list)
    used: Counter[str] = Counter()
    for text, word, kind in found:
        if len(taken[kind]) < EACH and used[word] < MOST:
            taken[kind].append(text)
            used[word] += 1
    return tuple(text for kind in taken for text in taken[kind]), tuple(
        kind for kind in taken for _ in taken[kind]
    )


@cache
def _all_windows() -> tuple[tuple[str, str, str], ...]:
    """Nine words, the tenth, and its class, wherever in enwik8's test part a word has one."""
    parts: dict[str, set[str]] = defaultdict(set)
    for synset in data("wordnet").train:
        # not the names and acronyms: "THI" has a plural, "this"
        for lemma in filter(str.islower, synset.lemmas):
            parts[lemma].add(synset.part)
    articles = _text.prose("".join(data("enwik8").test))
    runs = (
        run
        for text in articles
        for run in re.findall(r"(?<![\w'-])[A-Za-z]+(?: [A-Za-z]+){9,}(?![\w'-])", text)
    )
    return tuple(
        (" ".join(words[place - 9 : place]), words[place], kind)
        for words in (run.split(" ") for run in runs)
        for place in range(9, len(words))
        if (kind := word_class(words[place], parts))
    )


def word_class(word: str, parts: Mapping[str, set[str]]) -> str | None:
    """The one class of a word in small letters, None if it has none or several; parts: of speech,
    by lemma."""
    for kind, listed in CLOSED.items():
        if word in listed.split():
            return kind
    # short: "has" is also the plural of "ha"
    if len(word) < 4 or not word.islower() or word.endswith("ing"):
        return None
    found = {
        part for stem, possible in _stems(word) for part in parts.get(stem, set()) & set(possible)
    }
    if len(found) != 1:
        return None
    kind = OPEN[found.pop()]
    return kind if word.endswith(ENDINGS.get(kind, "")) else None


def _stems(word: str) -> Iterator[tuple[str, str]]:
    """The lemmas that a word may be a regular form of, and the parts of speech that have such a
    form."""
    yield word, "nvar"
    for ending, instead, possible in FORMS:
        if word.endswith(ending):
            yield word.removesuffix(ending) + instead, possible
