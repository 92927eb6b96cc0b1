"""Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and
Instruction-based Methods.

Feldhus, Hennig, Nasert, Ebert, Schwarzenberg and Möller, 2022. arXiv:2210.07222.
Claim: templates filled in by a search over a saliency map say only what it says, though a reader of
    them does not tell the prediction well.
Methods: tokens.verbalize, tokens.simulatability
Protocol: the paper's classifiers on IMDb and AG News with integrated gradients; verbalisations
    read by people, who say which label the model gave; a program reads the same texts beside
    them.

The paper's readers are people and GPT-3.5. Here they are two programs: a linear reader of the cited
words, and the model itself shown the cited words alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import xarray as xr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import data
from stratoscope.tokens import gradient_times_input, simulatability, verbalize

TEXTS, LONGEST = 200, 12  # film reviews, and the most words that one has
BEFORE, AFTER = "Review:", "\nThe sentiment of this review is"
CITED, WIDTH, BATCH, DRAWS = 3, 2, 16, 200


@claim(
    says="Search-based verbalisations are faithful by design",
    where="abstract",
    tier="identity",
    subject="random saliency maps",
    expect="faithful == 1 and forged == 0",
    null={"forged": "the same paragraphs about another map of the same tokens"},
)
def a_paragraph_says_what_the_map_says(seed: int) -> Measured:
    """The share of 200 paragraphs that `check` finds nothing wrong with; and when each is read
    beside another's map."""
    generator = np.random.default_rng(seed)
    tokens = [f" word{i}" for i in range(12)]
    maps = generator.standard_cauchy((200, 12))
    said = [verbalize.describe(tokens, row, CITED) for row in maps]
    good, forged = (
        np.mean([verbalize.check(text, tokens, row) == [] for text, row in zip(said, rows)])
        for rows in (maps, np.roll(maps, 1, axis=0))
    )
    return Measured(values={"faithful": good}, null={"forged": forged}, n=len(maps))


@claim(
    says="Verbalisations cite what the map ranks highest",
    where="abstract (faithful by design)",
    read="abstract",
    tier="small",
    side=True,
    subject="smollm2",
    kind="real",
    n="100 reviews",
    expect="faithful == 1 and spans > random",
    direction="faithful > 0.95 and spans > random",
    we_add="spans hold no less than as many single words",
    we_expect="spans >= words",
    null={"random": "as many spans at random places"},
    thresholds="1 and 0.95: by design, so that this tests the code and not the model",
)
def smollm2_is_told_truly(seed: int) -> Measured:
    """Gradient times input of SmolLM2's choice between positive and negative, for short film
    reviews (SST-2).

    faithful: paragraphs about the three strongest words that `check` finds nothing wrong with.
    spans and words: the part of the map that three spans of two tokens, and three single tokens,
    hold. random: three spans anywhere. All three comparisons hold all but by construction:
    `describe` and `check` share their rules, three spans are twice as many tokens as three words,
    and the best windows hold more than windows anywhere. This tests the code; of SmolLM2 only the
    sizes are news.
    """
    texts, maps, _ = _read(seed)
    generator = np.random.default_rng(seed)
    faithful, held = [], []
    for tokens, row in zip(texts, maps):
        faithful.append(verbalize.check(verbalize.describe(tokens, row, CITED), tokens, row) == [])
        ways = (simulatability.spans(row, WIDTH, CITED), simulatability.spans(row, 1, CITED))
        anywhere = simulatability.anywhere(row, WIDTH, CITED, generator)
        held.append([simulatability.coverage(row, cited) for cited in (*ways, anywhere)])
    spans, words, random = np.mean(held, axis=0)
    low, high = _bootstrap(np.array(held)[:, 0] - np.array(held)[:, 1], generator)
    return Measured(
        values={
            "faithful": np.mean(faithful),
            "spans": spans,
            "words": words,
            "gain": spans - words,
        },
        null={"random": random},
        n=len(maps),
        interval={"gain": (low, high)},
        figure=xr.DataArray(
            [spans, words, random],
            {"cited": ["spans", "words", "random spans"]},
            ["cited"],
            name="coverage",
        ),
    )


@claim(
    says="A reader of the verbalisation predicts the label better than one who is told nothing",
    where="the ledger; the abstract says only that these verbalisations fall short in "
    "simulatability",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="100 reviews",
    expect="cited > nothing + 0.1",
    direction="cited > nothing",
    we_add="and better than one who is told as many words at random",
    we_expect="cited > random_bound",
    null={
        "nothing": "the commoner label",
        "random": "as many words cited at random, 200 draws",
    },
    thresholds="0.1: the ledger's",
)
def a_reader_predicts_smollm2(seed: int) -> Measured:
    """A linear reader learns from all other texts which label SmolLM2 gives to a text of which
    three words are cited.

    It is told the words only, as the mean of their GloVe vectors, not where they push. SmolLM2
    leans to one answer, so that a label is on which side of the median difference a text is; told
    nothing, one is right half of the time. whole: all words. An earlier form asked 80 texts and
    only to beat the mean of 20 draws, which it did on seed 0 by one text (0.6625, 0.649). Of 156
    texts it does not beat the draws (0.647, 0.699): that the map chooses the words is not shown to
    help.
    """
    texts, maps, difference = _read(seed)
    labels, generator = difference > np.median(difference), np.random.default_rng(seed)
    words = [_words(tokens) for tokens in texts]

    def right(cited: list[list[range]]) -> np.ndarray:
        return (
            simulatability.guessed(
                np.stack([_told(w, spans) for w, spans in zip(words, cited)]), labels
            )
            == labels
        )

    told = right([simulatability.spans(row, 1, CITED) for row in maps])
    random = [
        right([simulatability.anywhere(row, 1, CITED, generator) for row in maps]).mean()
        for _ in range(DRAWS)
    ]
    whole = right([[range(len(row))] for row in maps])
    nothing = max(labels.mean(), 1 - labels.mean())
    return Measured(
        values={"cited": told.mean(), "whole": whole.mean()},
        null={"nothing": nothing, "random": random},
        n=len(maps),
        interval={"cited": _bootstrap(told, generator)},
        figure=xr.DataArray(
            [told.mean(), np.mean(random), whole.mean(), nothing],
            {"told": ["cited words", "random words", "all words", "nothing"]},
            ["told"],
            name="share of labels guessed",
        ),
        note="The figure shows the mean of the random words.",
    )


@cache
def _read(seed: int) -> tuple[list[list[str]], list[np.ndarray], np.ndarray]:
    """The tokens of each review, their attributions, and by how much SmolLM2 prefers positive."""
    lm = models.load("smollm2")
    short = [row["text"] for row in data("sst2").train if 4 <= len(row["text"].split()) <= LONGEST]
    chosen = [short[i] for i in np.random.default_rng(seed).permutation(len(short))[:TEXTS]]
    start, end = (
        len(lm.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (BEFORE, AFTER)
    )
    tokens, maps, differences = [], [], []
    for i in range(0, len(chosen), BATCH):
        batch = lm.batch([f"{BEFORE} {text}{AFTER}" for text in chosen[i : i + BATCH]])
        found = gradient_times_input.measure(lm, batch, answer=" positive", foil=" negative")
        for said, row in zip(batch.tokens, found.attribution.values):
            tokens.append(said[start : len(said) - end])
            maps.append(row[start : len(said) - end])
        differences.append(found.logit_difference.values)
    return tokens, maps, np.concatenate(differences)


@cache
def _glove() -> Any:
    return data("glove").train


def _words(tokens: list[str]) -> list[np.ndarray | None]:
    """For each token the GloVe vector of the word it is in; None where GloVe has none, and for
    punctuation."""
    glove, words = _glove(), []
    for token in tokens:
        if token.startswith(" ") or not words:
            words.append([])
        words[-1].append(token)
    spelled = ["".join(parts).strip().lower() for parts in words]
    known = [glove[word] if word.isalpha() and word in glove else None for word in spelled]
    return [vector for parts, vector in zip(words, known) for _ in parts]


def _told(words: list[np.ndarray | None], cited: list[range]) -> np.ndarray:
    found = [words[p] for span in cited for p in span if words[p] is not None]
    return np.mean(found, axis=0) if found else np.zeros(50)


def _bootstrap(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    means = [generator.choice(values, len(values)).mean() for _ in range(1000)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
