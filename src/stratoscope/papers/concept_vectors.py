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
What would change our mind: needles on vectors chosen by one half of the prompts that cost the
    concept a tenth of its probability on the other half, and nothing elsewhere; a training that
    could have turned a vector by 25 degrees, halved the concept, and left the vector.
What the authors may object: their concepts are topics such as Harry Potter in two models of 7
    billion parameters, asked by questions; ours are kinds of words, asked by the next word of
    prose, and spread over many vectors. Next words are no test of knowledge. We read the abstract.

Here a concept is a list of words. Its vector is chosen causally between the two whose projections
fit the list best: the one whose needle costs the concept most in prose of the training splits.
What is judged is prose of the test splits.
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
from stratoscope.maths import resample
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
    "school": "school teacher student college education class university",
    "music": "music song sing band guitar piano dance",
    "food": "food bread meat fruit milk cheese meal dinner",
    "weather": "rain snow wind storm sun cloud weather",
    "water": "water river sea ocean lake boat ship",
    "time": "hour minute day week month year century",
    "places": "city town village street road house building",
    "directions": "north south east west left right",
    "health": "health doctor hospital disease medical sick patients",
    "work": "work job labor employment workers wages industry",
    "government": "government president congress senate minister administration",
    "crime": "murder killer police prison gun thief",
    "emotion": "love hate fear anger joy sad happy",
    "clothes": "shirt dress hat coat shoes clothes",
    "plants": "tree flower grass leaf wood garden",
    "states": "California Texas Florida Virginia Ohio Kansas",
}
CONTEXTS, LENGTH = 8, 70  # prompts of each concept, and their length in letters
CANDIDATES, LEAST, VALIDATED = 2, 0.1, 10  # vectors tried, the loss that validates one, and so many
UNLEARNED, STEPS, RATE = 5, 60, 3e-5  # concepts, the most steps of ascent and its rate
SPOILT = 64  # vectors that the needle spoils


class Concept(NamedTuple):
    """A concept, its vector, and prompts that go on with one of its words."""

    name: str
    words: str
    unit: tuple[int, int]
    best: list[tuple[int, int]]  # those that fit its words best
    rival: tuple[int, int]  # a vector chosen alike among as many random ones of the same layers
    loss: float  # what its needle cost in prose of the training splits
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
    subjects=("smollm2", "gemma3-270m"),
    n="10 concepts",
    valid="validated >= 10",
    expect="concept_low >= 0.1 and concept_low >= 5 * max(unrelated_high, random_high)",
    direction="concept_low > unrelated and concept_low > random",
    null={
        "random": "as much noise on a vector chosen alike among as many random ones of the same "
        "layers, asked for the same completions"
    },
    thresholds="5: the ledger's; 0.1 is the smallest loss that would matter, and ten concepts whose"
    " vectors lose as much in other prose the fewest to judge: ours",
)
def needle_is_specific(lm: LM, seed: int) -> Measured:
    """The part of the probability of a word that is lost, in prose of the test splits which goes on
    with a word of the concept, and (unrelated) with a word of another one. Thirty concepts; judged
    are those whose vector was validated in prose of the training splits (the ten best, if fewer
    were). An earlier form took six concepts by weights alone, and colours carried the mean."""
    every, generator = _concepts(lm, seed), random.Random(seed)
    validated = sum(each.loss >= LEAST for each in every)
    concepts = every[: max(VALIDATED, validated)]
    plain = [_probability(lm, each.prompts, each.answers) for each in concepts]
    lost = []
    for number, each in enumerate(concepts):
        rest = [i for i in range(len(concepts)) if i != number]
        stock = [(i, j) for i in rest for j in range(len(plain[i]))]
        picked = generator.sample(stock, CONTEXTS)
        other = (
            [concepts[i].prompts[j] for i, j in picked],
            [concepts[i].answers[j] for i, j in picked],
        )
        with needle.edit(lm, [each.unit], seed=seed):
            own, beside = _probability(lm, each.prompts, each.answers), _probability(lm, *other)
        with needle.edit(lm, [each.rival], seed=seed):
            chance = _probability(lm, each.prompts, each.answers)
        before = np.mean([plain[i][j] for i, j in picked])
        own_before = plain[number].mean()
        kept = own.mean() / own_before, beside.mean() / before, chance.mean() / own_before
        lost.append([1 - float(part) for part in kept])
    table = np.array(lost)
    concept, unrelated, at_random = table.T
    chance = resample.interval(at_random, seed=seed)
    return Measured(
        values={"validated": validated},
        units={"concept": concept, "unrelated": unrelated},
        null={"random": chance.value},
        interval={"random": (chance.low, chance.high)},
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
    subjects=("smollm2", "gemma3-270m"),
    n="5 concepts",
    valid="could_leave < 0.9 and ascent_left <= 0.6",
    expect="cosine_low >= 0.95 and cosine_low > needle_cosine",
    null={"needle_cosine": "the same vector after a needle that removed as much"},
    thresholds="0.95: the ledger's; 0.9, below which the steps could have turned the vector: the"
    " review's; 0.6: ours",
)
def ascent_leaves_the_trace(lm: LM, seed: int) -> Measured:
    """Ascent on sentences of the training splits goes on until the concept's words, in prose of the
    test splits, are half as probable (or for 60 steps). cosine: of the concept's vector, before and
    after; could_leave: what as many steps of Adam could have left of it at least, the greatest of
    the concepts. Where that is near 1, the trace stays whatever was unlearned, and nothing is
    tested. By this arithmetic 60 steps of 3e-5 leave 0.99 at least, so that no test is to be
    expected here; steps of 1e-5 to 5e-5, said to be the paper's rates (not checked), must be some
    thousands to turn a vector. An earlier form passed at 0.95, which could not fail."""
    rows = _unlearned(lm, seed)
    names = ("cosine", "ascent_left")
    return Measured(
        values={"could_leave": max(row["could_leave"] for row in rows)},
        units={name: [row[name] for row in rows] for name in names},
        null={"needle_cosine": np.mean([row["needle_cosine"] for row in rows])},
        n=len(rows),
        note=_said(_concepts(lm, seed)[:UNLEARNED]),
    )


@claim(
    says="What was unlearned by spoiling the vectors is harder to bring back than what was "
    "unlearned by training",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="5 concepts",
    valid="ascent_left <= 0.6 and needle_left <= 0.6 and abs(ascent_left - needle_left) < 0.05",
    expect="back_difference_low > 0 and ascent_back > ascent_other",
    direction="back_difference > 0 and ascent_back > ascent_other",
    null={
        "needle_back": "the same hint where the needle removed as much",
        "ascent_other": "another concept's words as the hint",
    },
    thresholds="0.6 and 0.05, by which both must have removed enough and as much: ours; 0: no"
    " difference",
)
def the_needle_is_harder_to_undo(lm: LM, seed: int) -> Measured:
    """The needle spoils the concept's 64 best vectors, with as much noise as leaves as much as the
    ascent did (found by halving an interval). Then both are asked again with the concept's words
    before the prompt, a hint for the paper's jailbreaks: `back` is the share of the probability
    that this hint gives the model as it was, less the share that is left without the hint;
    back_difference is ascent's less the needle's."""
    rows = _unlearned(lm, seed)
    column = {name: [row[name] for row in rows] for name in rows[0]}
    both = {name: column[name] for name in ("ascent_back", "needle_back")}
    return Measured(
        units={name: column[name] for name in ("ascent_left", "needle_left", "ascent_back")}
        | {"back_difference": np.subtract(*both.values())},
        null={name: np.mean(column[name]) for name in ("needle_back", "ascent_other")},
        n=len(rows),
        note=f"{_said(_concepts(lm, seed)[:UNLEARNED])} {_ends(both)}",
    )


@cache
def _unlearned(lm: LM, seed: int) -> list[dict[str, float]]:
    """What ascent and the needle leave of each concept, without and with a hint."""
    concepts, rows = _concepts(lm, seed), []
    generator = random.Random(f"unlearned {seed}")
    prose = [each["text"] for name in ("sotu", "imdb") for each in data(name).train]
    generator.shuffle(prose)
    for number, each in enumerate(concepts[:UNLEARNED]):
        other = concepts[(number + 1) % len(concepts)].words
        texts = [[*prompt, end] for prompt, end in zip(*_prompts(lm, prose, each.words.split()))]
        plain, own, stranger = (_asked(lm, each, hint) for hint in ("", each.words, other))
        taken: list[int] = []

        def half(student: LM, step: int, each: Concept = each, plain: float = plain) -> bool:
            taken.append(step)  # noqa: B023
            return _asked(student, each, "") <= plain / 2

        ascent = fine_tune.edit(lm, texts, steps=STEPS, rate=RATE, ascend=True, stop=half)
        with ascent:
            left, hinted, beside = (_asked(lm, each, hint) for hint in ("", each.words, other))
        spoilt = _needle_to(lm, each, left, seed)
        with spoilt:
            needle_left, needle_hinted = _asked(lm, each, ""), _asked(lm, each, each.words)
        vector = lm.weight(f"layers.{each.unit[0]}.mlp.out")[:, each.unit[1]].detach()
        rows.append(
            {
                "ascent_left": left / plain,
                "needle_left": needle_left / plain,
                "ascent_back": hinted / own - left / plain,
                "needle_back": needle_hinted / own - needle_left / plain,
                "ascent_other": beside / stranger - left / plain,
                "cosine": _cosine(lm, each.unit, ascent),
                "could_leave": parametric_trace.least_cosine(vector, len(taken), RATE),
                "needle_cosine": _cosine(lm, each.unit, spoilt),
            }
        )
    return rows


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
def _concepts(lm: LM, seed: int) -> list[Concept]:
    """All concepts, with prompts of the test splits, those whose vectors cost most in prose of the
    training splits first."""
    generator = random.Random(f"concepts {seed}")
    found = concept_vectors.measure(lm, [f" {words}" for words in WORDS.values()], top=SPOILT)
    prose = {}
    for split in ("train", "test"):
        prose[split] = [e["text"] for name in ("sotu", "imdb") for e in getattr(data(name), split)]
        generator.shuffle(prose[split])
    made = []
    for number, (name, words) in enumerate(WORDS.items()):
        asked = _prompts(lm, prose["train"], words.split())
        best = list(zip(found.layer.values[number].tolist(), found.neuron.values[number].tolist()))
        strangers = [(at, generator.randrange(lm.dims.neurons)) for at, _ in best[:CANDIDATES]]
        loss, unit = _dearest(lm, best[:CANDIDATES], asked, seed)
        rival = _dearest(lm, strangers, asked, seed)[1]
        judged = _prompts(lm, prose["test"], words.split())
        made.append(Concept(name, words, unit, best, rival, loss, *judged))
    return sorted(made, key=lambda each: -each.loss)


def _dearest(
    lm: LM,
    units: Sequence[tuple[int, int]],
    asked: tuple[list[list[int]], list[int]],
    seed: int,
) -> tuple[float, tuple[int, int]]:
    """The vector whose needle costs these completions most, and which part of their
    probability."""
    plain, found = _probability(lm, *asked).mean(), []
    for unit in units:
        with needle.edit(lm, [unit], seed=seed):
            found.append((1 - float(_probability(lm, *asked).mean() / plain), unit))
    return max(found)


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
        answers.append(lm.tokenizer(match[0], add_special_tokens=False)["input_ids"][0])
        if len(prompts) == CONTEXTS:
            break
    return prompts, answers


@torch.no_grad()
def _probability(lm: LM, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> np.ndarray:
    said = last_logits(lm, [list(prompt) for prompt in prompts]).float().softmax(dim=-1).cpu()
    return said.gather(1, torch.tensor(answers)[:, None])[:, 0].double().numpy()


def _asked(lm: LM, each: Concept, hint: str) -> float:
    """Mean probability of the answers, with the words of the hint before the prompt."""
    if not hint:
        return float(_probability(lm, each.prompts, each.answers).mean())
    before = lm.tokenizer(", ".join(hint.split()) + ". ")["input_ids"]
    begun = len(lm.tokenizer("")["input_ids"])  # a model's BOS stands before the hint alone
    hinted = [[*before, *prompt[begun:]] for prompt in each.prompts]
    return float(_probability(lm, hinted, each.answers).mean())


def _cosine(lm: LM, unit: tuple[int, int], after: Edit) -> float:
    return float(parametric_trace.measure(lm, [unit], after=after).cosine[0])


def _ends(found: dict[str, list[float]]) -> str:
    told = (f"{name} {min(row):.2f} to {max(row):.2f}" for name, row in found.items())
    return f"The least and greatest concept: {', '.join(told)}."


def _said(concepts: Sequence[Concept]) -> str:
    named = (
        f"{c.name} L{c.unit[0]}N{c.unit[1]} ({c.loss:.2f} lost in training prose)" for c in concepts
    )
    return f"{'; '.join(named)}."
