"""Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces.

Hong, Yu, Yang, Ravfogel and Geva, 2024. arXiv:2406.11614. At EMNLP 2025: Intrinsic Test of
Unlearning [...].
Claim: unlearning by training hardly touches the value vectors that hold a concept, while spoiling
    these vectors removes what the model knows of it and makes it harder to bring back.
Methods: neurons.concept_vectors, neurons.parametric_trace, editing.needle, editing.fine_tune
Protocol: the two models and the hundreds of concepts of the benchmark ConceptVectors
    (yihuaihong/ConceptVectors), each vector validated by its own needle first; questions, not
    next words; the authors' unlearning methods at the authors' rates, and how far these can move
    a vector at most.

The paper's concepts are topics such as Harry Potter in two models of 7 billion parameters. Here a
concept is a list of words, its vector the one whose projection fits the list best, and the six
concepts are those whose vectors fit best: by weights alone, before any prompt is read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import fine_tune, needle
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import last_logits
from stratoscope.lab import data, planted
from stratoscope.models import LM
from stratoscope.neurons import concept_vectors, parametric_trace
from stratoscope.results import label

WORDS = {
    "months": "January February March April June July August September October November December",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "numbers": "two three four five six seven eight nine ten",
    "colours": "red blue green yellow black white brown purple orange pink",
    "family": "mother father brother sister son daughter wife husband uncle aunt",
    "countries": "France Germany Spain Italy England Russia China Japan India Mexico",
    "animals": "dog cat horse bird fish cow pig sheep lion bear",
    "body": "hand arm leg foot head eye ear nose mouth finger",
    "money": "dollars money pay cost price bank tax wages",
    "war": "war army soldiers enemy battle troops military weapons",
    "faith": "God church religion prayer faith holy Christian Jesus",
    "law": "law court judge crime police trial lawyer justice",
    "film": "movie film actor director scene script cinema acting",
    "seasons": "spring summer autumn winter",
}
CHOSEN, CONTEXTS, LENGTH = 6, 24, 110  # concepts; prompts of each, and their length in letters
UNLEARNED, STEPS, RATE = 3, 60, 3e-5  # concepts, the most steps of ascent and its rate
SPOILT = 64  # vectors that the needle spoils


class Concept(NamedTuple):
    """A concept, its vector, and prompts that go on with one of its words."""

    name: str
    words: str
    unit: tuple[int, int]
    best: list[tuple[int, int]]  # its vector first
    share: float
    prompts: list[list[int]]
    answers: list[int]


@claim(
    says="The needle leaves nothing of a vector: noise s times its size leaves a "
    "cosine of 1 / sqrt(1 + s^2)",
    where="Needle is the paper's (section not checked); the closed form is geometry",
    tier="identity",
    subject="planted fact model (Llama)",
    expect="abs(cosine - expected) < 0.15 and untouched == 1",
    null={"stranger": "the cosine of another neuron's vector with this one"},
)
def a_needle_spoils_one_vector(seed: int) -> Measured:
    """Mean cosine of a vector of 128 dimensions before and after, over 50 draws; and that of a
    neuron that was not named."""
    p = planted.fact_lookup(seed)
    lm = models.wrap(p.model, p.tokenizer)
    found = [
        parametric_trace.measure(
            lm, [(1, 13), (1, 17)], after=needle.edit(lm, [(1, 13)], noise=2.0, seed=draw), top=1
        )
        for draw in range(50)
    ]
    cosine = np.stack([each.cosine.values for each in found]).mean(axis=0)
    null = float(np.mean([each.null_cosine.values[0] for each in found]))
    values = {"cosine": cosine[0], "expected": 5**-0.5, "untouched": round(float(cosine[1]), 5)}
    return Measured(values=values, null={"stranger": null}, n=50)


@claim(
    says="Spoiling a concept vector removes the knowledge of its concept and not of others",
    where="abstract",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="5 concepts",
    expect="concept >= 5 * abs(unrelated) and concept >= 5 * abs(random) and concept >= 0.1",
    direction="concept > unrelated and concept > random",
    null={
        "random": "as much noise on a random value vector of the same layer, asked for the "
        "same completions"
    },
    thresholds="5: the ledger's; 0.1 is the smallest loss that would matter: ours",
)
def needle_is_specific(seed: int) -> Measured:
    """The part of the probability of a word that is lost, in prose of the test splits which goes on
    with a word of the concept, and (unrelated) with a word of another one; mean over six concepts,
    one vector each. On seed 0 colours alone carry the mean (0.45 lost): without them it is -0.01,
    and war and faith gain."""
    lm, concepts, generator = _subject(), _concepts("test", seed), random.Random(seed)
    plain = [_probability(lm, each.prompts, each.answers) for each in concepts]
    lost = []
    for number, each in enumerate(concepts):
        rest = [i for i in range(len(concepts)) if i != number]
        picked = [(generator.choice(rest), generator.randrange(CONTEXTS)) for _ in range(CONTEXTS)]
        other = (
            [concepts[i].prompts[j] for i, j in picked],
            [concepts[i].answers[j] for i, j in picked],
        )
        stranger = (
            each.unit[0],
            (each.unit[1] + generator.randrange(1, lm.dims.neurons)) % lm.dims.neurons,
        )
        with needle.edit(lm, [each.unit], seed=seed):
            own, beside = _probability(lm, each.prompts, each.answers), _probability(lm, *other)
        with needle.edit(lm, [stranger], seed=seed):
            chance = _probability(lm, each.prompts, each.answers)
        before = np.mean([plain[i][j] for i, j in picked])
        kept = (
            own.mean() / plain[number].mean(),
            beside.mean() / before,
            chance.mean() / plain[number].mean(),
        )
        lost.append([1 - float(part) for part in kept])
    table = np.array(lost)
    concept, unrelated, at_random = table.T
    return Measured(
        units={"concept": concept, "unrelated": unrelated},
        null={"random": at_random.mean()},
        n=len(concepts),
        figure=label(
            table,
            ("example", "role"),
            name="lost",
            method="neurons.concept_vectors",
            provenance=lm.provenance,
            seed=seed,
            coords={
                "concept": (("example",), [each.name for each in concepts]),
                "role": ["concept", "unrelated", "random"],
            },
        ),
        note=_said(concepts),
    )


@claim(
    says="Where gradient ascent has halved what a model says of a concept, its vector "
    "is hardly changed",
    where="abstract",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="3 concepts",
    valid="ascent_left <= 0.6 and needle_left <= 0.6",
    expect="cosine >= 0.95",
    we_add="a hint (for the paper's jailbreaks) brings more back than where the needle "
    "removed as much, and more than another concept's hint",
    we_expect="abs(ascent_left - needle_left) < 0.05 and ascent_back > needle_back and "
    "ascent_back > ascent_other",
    null={
        "needle_back": "the same hint where the needle removed as much",
        "ascent_other": "another concept's words as the hint",
    },
    thresholds="0.95: the ledger's, and no null is compared with: 60 steps at this rate "
    "cannot move the cosine below 0.99, so that this cannot fail until longer "
    "steps are taken; 0.6 and 0.05: ours",
)
def ascent_leaves_the_trace(seed: int) -> Measured:
    """Ascent on sentences of the training splits goes on until the concept's words, in prose of the
    test splits, are half as probable (or for 60 steps). The needle spoils the concept's 64 best
    vectors, with as much noise as leaves as much (found by halving an interval). Then both are
    asked again with the concept's words before the prompt: `back` is the share of the probability
    that this hint gives the model as it was, less the share that is left without the hint. cosine:
    of the concept's best vector, before and after the ascent, the least of three concepts;
    needle_cosine: after the needle.

    An earlier form stopped ascent where a needle on one vector had left the concept, which was 99 %
    on seed 0, so that its cosine of 1 said nothing; it was taken back for this one, and with it
    `needle_cosine < 0.5`, which noise makes true. The first run on seed 0 used a rate of 2e-6 by
    mistake: 60 steps left 0.80, so that nothing was shown. Now it holds in the mean; the three
    concepts range from -0.25 to 0.41 after ascent and from -0.20 to 0.15 after the needle, so that
    it may be chance."""
    lm, concepts, trained = _subject(), _concepts("test", seed), _concepts("train", seed)
    rows = []
    for number, (each, source) in enumerate(zip(concepts[:UNLEARNED], trained)):
        other = concepts[(number + 1) % len(concepts)].words
        texts = [[*prompt, answer] for prompt, answer in zip(source.prompts, source.answers)]
        plain, own, stranger = (_asked(lm, each, hint) for hint in ("", each.words, other))
        half = lambda student, _, each=each, plain=plain: _asked(student, each, "") <= plain / 2  # noqa: E731
        ascent = fine_tune.edit(lm, texts, steps=STEPS, rate=RATE, ascend=True, stop=half)
        with ascent:
            left, hinted, beside = (
                _asked(lm, each, ""),
                _asked(lm, each, each.words),
                _asked(lm, each, other),
            )
        spoilt = _needle_to(lm, each, left, seed)
        with spoilt:
            needle_left, needle_hinted = _asked(lm, each, ""), _asked(lm, each, each.words)
        rows.append(
            {
                "ascent_left": left / plain,
                "needle_left": needle_left / plain,
                "ascent_back": hinted / own - left / plain,
                "needle_back": needle_hinted / own - needle_left / plain,
                "ascent_other": beside / stranger - left / plain,
                "cosine": _cosine(lm, each.unit, ascent),
                "needle_cosine": _cosine(lm, each.unit, spoilt),
            }
        )
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    mean["cosine"] = min(row["cosine"] for row in rows)
    null = {name: mean.pop(name) for name in ("needle_back", "ascent_other")}
    both = {name: [row[name] for row in rows] for name in ("ascent_back", "needle_back")}
    return Measured(
        values=mean,
        null=null,
        n=len(rows),
        note=f"{_said(concepts[:UNLEARNED])} {_ends(both)}",
    )


def _needle_to(lm: LM, each: Concept, left: float, seed: int) -> Edit:
    """The needle on the concept's best vectors with the noise that leaves its words as probable as
    `left`."""
    low, high = 0.0, 32.0
    for _ in range(9):
        middle = (low + high) / 2
        made = needle.edit(lm, each.best, noise=middle, seed=seed)
        with made:
            low, high = (middle, high) if _asked(lm, each, "") > left else (low, middle)
    return made


@cache
def _subject() -> LM:
    return models.load("smollm2")


@cache
def _concepts(split: str, seed: int) -> list[Concept]:
    """The concepts whose best vectors share most of their first tokens with them, with prompts
    drawn from prose."""
    lm, generator = _subject(), random.Random(f"{split} {seed}")
    found = concept_vectors.measure(lm, [f" {words}" for words in WORDS.values()], top=SPOILT)
    order = np.argsort(-found.share.values[:, 0], kind="stable")[:CHOSEN]
    texts = [each["text"] for name in ("sotu", "imdb") for each in getattr(data(name), split)]
    generator.shuffle(texts)
    names, made = list(WORDS), []
    for number in order:
        prompts, answers = _prompts(lm, texts, WORDS[names[number]].split())
        best = list(zip(found.layer.values[number].tolist(), found.neuron.values[number].tolist()))
        share = float(found.share[number, 0])
        made.append(
            Concept(names[number], WORDS[names[number]], best[0], best, share, prompts, answers)
        )
    return made


def _prompts(
    lm: LM, texts: Sequence[str], words: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """What stands before a word of the concept, one of each text that has one; and the word's first
    token."""
    pattern, prompts, answers = re.compile(rf" ({'|'.join(words)})\b"), [], []
    for text in texts:
        match = next((m for m in pattern.finditer(text, LENGTH)), None)
        if match is None:
            continue
        before = text[match.start() - LENGTH : match.start()].split(" ", 1)[-1]
        prompts.append(lm.tokenizer(before)["input_ids"])
        answers.append(lm.tokenizer(match[0])["input_ids"][0])
        if len(prompts) == CONTEXTS:
            break
    return prompts, answers


@torch.no_grad()
def _probability(lm: LM, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> np.ndarray:
    said = last_logits(lm, [list(prompt) for prompt in prompts]).float().softmax(dim=-1).cpu()
    return said.gather(1, torch.tensor(answers)[:, None])[:, 0].double().numpy()


def _asked(lm: LM, each: Concept, hint: str) -> float:
    """Mean probability of the answers, with the words of the hint before the prompt."""
    before = lm.tokenizer(", ".join(hint.split()) + ". ")["input_ids"] if hint else []
    return float(
        _probability(lm, [[*before, *prompt] for prompt in each.prompts], each.answers).mean()
    )


def _cosine(lm: LM, unit: tuple[int, int], after: Edit) -> float:
    return float(parametric_trace.measure(lm, [unit], after=after).cosine[0])


def _ends(found: dict[str, list[float]]) -> str:
    told = (f"{name} {min(row):.2f} to {max(row):.2f}" for name, row in found.items())
    return f"The least and greatest concept: {', '.join(told)}."


def _said(concepts: Sequence[Concept]) -> str:
    named = (f"{c.name} L{c.unit[0]}N{c.unit[1]} (share {c.share:.2f})" for c in concepts)
    return f"{'; '.join(named)}."
