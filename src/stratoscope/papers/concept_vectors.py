"""Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces.

Hong, Yu, Yang, Ravfogel and Geva, 2024. arXiv:2406.11614. At EMNLP 2025: Intrinsic Test of Unlearning [...].
Claim: unlearning by training hardly touches the value vectors that hold a concept, while spoiling these vectors removes
    what the model knows of it and makes it harder to bring back.
Methods: neurons.concept_vectors, neurons.parametric_trace, editing.needle, editing.fine_tune

The paper's concepts are topics such as Harry Potter in two models of 7 billion parameters. Here a concept is a list of
words, its vector the one whose projection fits the list best, and the six concepts are those whose vectors fit best: by
weights alone, before any prompt is read.
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
CHOSEN, CONTEXTS, LENGTH, UNLEARNED, STEPS, RATE = 6, 24, 110, 3, 12, 1e-5


class Concept(NamedTuple):
    """A concept, its vector, and prompts that go on with one of its words."""

    name: str
    words: str
    unit: tuple[int, int]
    share: float
    prompts: list[list[int]]
    answers: list[int]


@claim(
    says="The needle leaves nothing of a vector: noise s times its size leaves a cosine of 1 / sqrt(1 + s^2)",
    where="Needle is the paper's (section not checked); the closed form is geometry",
    tier="identity",
    subject="planted fact model (Llama)",
    expect="abs(cosine - expected) < 0.15 and untouched == 1",
    null="the cosine of another neuron's vector with this one",
)
def a_needle_spoils_one_vector(seed: int) -> Measured:
    """Mean cosine of a vector of 128 dimensions before and after, over 50 draws; and that of a neuron that was not named."""
    p = planted.fact_lookup(seed)
    lm = models.wrap(p.model, p.tokenizer)
    found = [
        parametric_trace.measure(lm, [(1, 13), (1, 17)], after=needle.edit(lm, [(1, 13)], noise=2.0, seed=draw), top=1)
        for draw in range(50)
    ]
    cosine = np.stack([each.cosine.values for each in found]).mean(axis=0)
    null = float(np.mean([each.null_cosine.values[0] for each in found]))
    values = {"cosine": cosine[0], "expected": 5**-0.5, "untouched": round(float(cosine[1]), 5)}
    return Measured(values=values, null={"stranger": null}, n=50)


@claim(
    says="Spoiling a concept vector removes the knowledge of its concept and not of others",
    where="abstract; the factor of five is the ledger's",
    tier="small",
    subject="smollm2",
    expect="concept >= 5 * abs(unrelated) and concept >= 5 * abs(random) and concept >= 0.1",
    direction="concept > unrelated and concept > random",
    null="as much noise on a random value vector of the same layer, asked for the same completions",
)
def needle_is_specific(seed: int) -> Measured:
    """The part of the probability of a word that is lost, in prose of the test splits which goes on with a word of the
    concept, and (unrelated) with a word of another one; mean over six concepts, one vector each. On seed 0 colours alone
    carry the mean (0.45 lost): without them it is -0.01, and war and faith gain."""
    lm, concepts, dice = _subject(), _concepts("test", seed), random.Random(seed)
    plain = [_probability(lm, each.prompts, each.answers) for each in concepts]
    lost = []
    for number, each in enumerate(concepts):
        rest = [i for i in range(len(concepts)) if i != number]
        picked = [(dice.choice(rest), dice.randrange(CONTEXTS)) for _ in range(CONTEXTS)]
        other = [concepts[i].prompts[j] for i, j in picked], [concepts[i].answers[j] for i, j in picked]
        stranger = (each.unit[0], (each.unit[1] + dice.randrange(1, lm.dims.neurons)) % lm.dims.neurons)
        with needle.edit(lm, [each.unit], seed=seed):
            own, beside = _probability(lm, each.prompts, each.answers), _probability(lm, *other)
        with needle.edit(lm, [stranger], seed=seed):
            chance = _probability(lm, each.prompts, each.answers)
        before = np.mean([plain[i][j] for i, j in picked])
        kept = own.mean() / plain[number].mean(), beside.mean() / before, chance.mean() / plain[number].mean()
        lost.append([1 - float(part) for part in kept])
    table = np.array(lost)
    concept, unrelated, at_random = table.mean(axis=0)
    return Measured(
        values={"concept": concept, "unrelated": unrelated},
        null={"random": at_random},
        n=len(concepts) * CONTEXTS,
        interval={"concept": (table[:, 0].min(), table[:, 0].max())},
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
        note=f"{_said(concepts)} The interval is the least and greatest concept.",
    )


@claim(
    says="Unlearning by gradient ascent hardly changes concept vectors, and what it hides is easier to bring back than "
    "what the needle removed",
    where="abstract; the cosine of 0.95 is the ledger's; the hint, for the paper's jailbreaks, is ours",
    tier="small",
    subject="smollm2",
    expect="cosine >= 0.95 and needle_cosine < 0.5 and ascent_back > needle_back",
    direction="cosine >= 0.95 and cosine > needle_cosine",
    null="the value vector of another neuron of the same layer: its cosine",
)
def ascent_leaves_the_trace(seed: int) -> Measured:
    """Ascent on sentences of the training splits ends once the concept's words are as improbable as after the needle (or
    after 12 steps). Then both are asked again with the concept's words before the prompt: `back` is the share of the
    probability that this hint gives the model as it was, less the share that is left without the hint.

    Two of the three comparisons cannot fail: the needle's cosine is that of its noise, and twelve steps of Adam at 1e-5
    cannot bring the cosine below 0.999999, whatever the gradient. Only `back` is open, and there the two are not level: on
    seed 0 the needle had removed 0.7 % of the probability (for war it added some: there ascent had met its goal before it
    began) and ascent 4.3 %, mean of three concepts, without an interval. Whether unlearning that works leaves the trace is
    not shown."""
    lm, concepts, trained = _subject(), _concepts("test", seed)[:UNLEARNED], _concepts("train", seed)
    rows = []
    for each, source in zip(concepts, trained):
        texts = [[*prompt, answer] for prompt, answer in zip(source.prompts, source.answers)][:STEPS]
        plain, hinted = _asked(lm, each)
        spoilt = needle.edit(lm, [each.unit], seed=seed)
        with spoilt:
            left = [after.mean() / before.mean() for after, before in zip(_asked(lm, each), (plain, hinted))]
        ended = left[0] * plain.mean()
        reached = lambda student, _, each=each, ended=ended: (  # noqa: E731
            _probability(student, each.prompts, each.answers).mean() <= ended
        )
        ascent = fine_tune.edit(lm, texts, steps=STEPS, rate=RATE, ascend=True, stop=reached)
        with ascent:
            left += [after.mean() / before.mean() for after, before in zip(_asked(lm, each), (plain, hinted))]
        rows.append([*left, *_cosines(lm, each.unit, ascent), _cosines(lm, each.unit, spoilt)[0]])
    needle_plain, needle_hint, plain_left, hint_left, cosine, stranger, spoilt_cosine = np.mean(rows, axis=0)
    return Measured(
        values={
            "cosine": cosine,
            "needle_cosine": spoilt_cosine,
            "ascent_back": hint_left - plain_left,
            "needle_back": needle_hint - needle_plain,
            "ascent_left": plain_left,
            "needle_left": needle_plain,
        },
        null={"stranger": stranger},
        n=len(rows) * CONTEXTS,
        note=_said(concepts),
    )


@cache
def _subject() -> LM:
    return models.load("smollm2")


@cache
def _concepts(split: str, seed: int) -> list[Concept]:
    """The concepts whose best vectors share most of their first tokens with them, with prompts drawn from prose."""
    lm, dice = _subject(), random.Random(f"{split} {seed}")
    found = concept_vectors.measure(lm, [f" {words}" for words in WORDS.values()], top=1).isel(rank=0)
    order = np.argsort(-found.share.values, kind="stable")[:CHOSEN]
    texts = [each["text"] for name in ("sotu", "imdb") for each in getattr(data(name), split)]
    dice.shuffle(texts)
    names, made = list(WORDS), []
    for number in order:
        prompts, answers = _prompts(lm, texts, WORDS[names[number]].split())
        unit = int(found.layer[number]), int(found.neuron[number])
        made.append(Concept(names[number], WORDS[names[number]], unit, float(found.share[number]), prompts, answers))
    return made


def _prompts(lm: LM, texts: Sequence[str], words: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """What stands before a word of the concept, one of each text that has one; and the word's first token."""
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


def _asked(lm: LM, each: Concept) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the answers, without and with the concept's words before the prompt."""
    hint = lm.tokenizer(", ".join(each.words.split()) + ". ")["input_ids"]
    hinted = [[*hint, *prompt] for prompt in each.prompts]
    return _probability(lm, each.prompts, each.answers), _probability(lm, hinted, each.answers)


def _cosines(lm: LM, unit: tuple[int, int], after: Edit) -> tuple[float, float]:
    found = parametric_trace.measure(lm, [unit], after=after)
    return float(found.cosine[0]), float(found.null_cosine[0])


def _said(concepts: Sequence[Concept]) -> str:
    return f"{'; '.join(f'{c.name} L{c.unit[0]}N{c.unit[1]} (share {c.share:.2f})' for c in concepts)}."
