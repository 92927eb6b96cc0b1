"""Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?

Jin, Yu, Huang, Zeng, Wang, Hua, Zhao, Mei, Meng, Ding, Yang, Du and Zhang, 2024. arXiv:2404.07066.
Claim: simple, factual concepts can be read in early layers and inferential ones only in deep ones;
    noise before the text or coarser weights push them deeper.
Methods: layers.concept_depth, editing.round_weights
Protocol: Gemma, LLaMA and QWen of several sizes; the nine data sets of the authors' code
    (Luckfort/CD), each statement inside its instruction, 60/40 split with groups kept together;
    weights as they are, in 8 and in 16 bits.
What would change our mind: three tasks whose convergence depths come in the paper's order with
    intervals apart, on a model that solves all three and not its control task; a shift by noise or
    by coarser weights of a layer or more that other folds of the same texts do not give.
What the authors may object: they put each statement into an instruction and ask models of 2 to 70
    billion parameters; bare statements show a small model less. Their depths are read off the
    curves, ours are the first depth near the best. Capitals and coin flips are ours, not theirs. We
    read their code in part and the abstract.

Our tasks stand in for the paper's: capitals for its Cities, SST-2 for its STSA, and coin flips made
as in its Coinflip. Every text ends with the same token, so that what is read has to come from the
layers. In the miniature it ends with the relation asked for, which alone tells none of its
concepts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import round_weights
from stratoscope.engine.metric import last_logits
from stratoscope.lab import data, make, planted
from stratoscope.lab.miniatures import tiny_twohop
from stratoscope.layers import concept_depth
from stratoscope.maths import resample
from stratoscope.models import LM
from stratoscope.results import label

TEXTS, BITS = 240, 4
PEOPLE = (
    "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nick Olga Paul "
    "Rosa "
    "Sam Tina Victor"
).split()


class Task(NamedTuple):
    """Texts of two kinds, and what each is about: one group is held out together."""

    texts: list[str]
    kinds: list[int]
    groups: list[str] | None = None

    @property
    def units(self) -> list[str]:
        """What each text belongs to: its group, or itself."""
        return self.groups or [str(number) for number in range(len(self.texts))]

    def fit(self, lm: LM, seed: int, states: Tensor | None = None) -> xr.Dataset:
        """Probes of all depths; states: those of the texts, where they were read before."""
        read = self.texts if states is None else states
        return concept_depth.fit(lm, read, labels=self.kinds, groups=self.groups, seed=seed).result


@claim(
    says="A concept becomes readable at the layer that computes it",
    where="abstract",
    tier="identity",
    subject="planted.suppression",
    expect="converged == 1 and jumped == 1 and best == 1 and shuffled < 0.8",
    null={"shuffled": "the same probes on labels dealt out anew"},
)
def a_moved_word_is_read_after_its_layer(seed: int) -> Measured:
    """Layer 0 moves a name to the last word, which is the same in all prompts: depth 1 is the first
    that can tell."""
    p = planted.suppression()
    lm = models.wrap(p.model, p.tokenizer)
    texts = [v.clean for v in p.variants(240, seed=seed) if v.answer in ("Finn", "Hana")]
    kinds = [int("Hana" in text.split()) for text in texts]
    found = concept_depth.fit(lm, texts, labels=kinds, seed=seed).result
    return Measured(
        values={
            "converged": found.convergence_depth,
            "jumped": found.jump_depth,
            "best": found.accuracy.max(),
        },
        null={"shuffled": found.null.max()},
        n=len(texts),
    )


@claim(
    says="Simpler concepts converge in shallower layers: factual before emotional "
    "before inferential",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="240 texts",
    valid="min(factual_accuracy, emotional_accuracy, inferential_accuracy) >= "
    "shuffled_accuracy + 0.05 and emotional_accuracy > untrained_accuracy and "
    "length_alone < 0.6 and control_accuracy < inferential_accuracy - 0.05",
    expect="factual_high < emotional_low and emotional_high < inferential_low",
    direction="factual < inferential",
    null={
        "shuffled_accuracy": "labels dealt out anew, the best of all depths and tasks",
        "untrained_accuracy": "an untrained model of the same shape, on the emotional task",
        "control_accuracy": "the coin flips' texts with a kind dealt out to each first person: "
        "what a probe learns by heart, the best of all depths",
        "length_alone": "coin flips told by their number of tokens, as well as can be",
    },
    thresholds="an order of three depths, which chance gives in 1 of 6 cases, by intervals that"
    " do not meet; 0.05 above dealt-out labels and the control task: ours; 0.6: the review's,"
    " so that counting tokens does not solve the coin flips",
)
def simple_concepts_converge_early(lm: LM, seed: int) -> Measured:
    """Convergence depth of three tasks, 240 texts each, five folds. clear: how far the best
    accuracy of the task that goes worst is above the best that dealt-out labels reach. The control
    task is Hewitt and Liang's: the coin flips' texts, and a kind that was dealt out to each first
    person: it is in the text and means nothing."""
    tasks = {
        "factual": _factual(seed),
        "emotional": _emotional(seed),
        "inferential": _inferential(seed),
    }
    read = {name: concept_depth.states(lm, task.texts) for name, task in tasks.items()}
    found = {name: task.fit(lm, seed, read[name]) for name, task in tasks.items()}
    blank = tasks["emotional"].fit(_untrained(lm, seed), seed)
    control = _control(tasks["inferential"], seed).fit(lm, seed, read["inferential"])
    best = {name: float(result.accuracy.max()) for name, result in found.items()}
    return Measured(
        values={name: result.convergence_depth for name, result in found.items()}
        | {f"{name}_accuracy": value for name, value in best.items()}
        | {f"{name}_jump": _or_none(result.jump_depth) for name, result in found.items()}
        | {"clear": min(best[name] - float(found[name].null.max()) for name in found)},
        null={
            "shuffled_accuracy": max(float(result.null.max()) for result in found.values()),
            "untrained_accuracy": blank.accuracy.max(),
            "control_accuracy": control.accuracy.max(),
            "length_alone": _by_length(lm, tasks["inferential"]),
        },
        n=TEXTS,
        interval={
            name: _interval(result, tasks[name].units, seed) for name, result in found.items()
        },
        figure=_figure(found),
        note="A jump of -1: no layer raises accuracy by a tenth. Intervals resample texts.",
    )


@claim(
    says="Simpler concepts converge in shallower layers: factual before emotional "
    "before inferential",
    where="abstract",
    read="abstract",
    tier="small",
    subject="tiny-twohop 2",
    kind="miniature",
    n="400 texts",
    valid="clear >= 0.05",
    expect="named < one_hop and one_hop < two_hops",
    direction="named < two_hops",
    null={
        "shuffled_accuracy": "labels dealt out anew, the best of all depths and concepts",
        "untrained_accuracy": "an untrained model of the same shape, on what must be looked up",
    },
    thresholds="an order of three depths, which chance gives in 1 of 6 cases; clear, how far"
    " the worst concept is above both nulls, is 0.05 at least: ours",
)
def fewer_look_ups_converge_early(seed: int) -> Measured:
    """The same on a miniature whose questions need two look-ups: coin flips turned out to be easy
    for smollm2. It knows no emotions; its three concepts go from simple to inferential. At the last
    token of questions answered right: which half of the relations the prompt names first (no
    look-up), in which random half of the people the bridge is (one), and the answer (two). No two
    questions share a fact at the same hop, so no probe knows a fact by heart; which half a person
    is in has to be learnt from other questions. clear: the smallest lead of a best accuracy over
    its nulls. The concepts were chosen on a trial with seed 7, where the last token said little of
    the person whom the prompt names."""
    lm = models.load(make("tiny-twohop", seed=seed))
    asked = _answered(lm, seed)
    people = sorted({question.prompt.split()[0] for question in asked})
    half = {*random.Random(f"half {seed}").sample(people, len(people) // 2)}
    named = sorted({question.prompt.split()[2] for question in asked})
    kinds = {
        "named": [
            int(question.prompt.split()[2] in named[: len(named) // 2]) for question in asked
        ],
        "one_hop": [int(question.bridge in half) for question in asked],
        "two_hops": [int(question.answer in half) for question in asked],
    }
    texts, blank = [question.prompt for question in asked], _untrained(lm, seed)
    found = {
        name: concept_depth.fit(lm, texts, labels=kind, seed=seed).result
        for name, kind in kinds.items()
    }
    plain = {
        name: concept_depth.fit(blank, texts, labels=kinds[name], seed=seed).result
        for name in ("one_hop", "two_hops")
    }
    best = {name: float(result.accuracy.max()) for name, result in found.items()}
    shuffled = {name: float(result.null.max()) for name, result in found.items()}
    untrained = {name: float(result.accuracy.max()) for name, result in plain.items()}
    return Measured(
        values={name: result.convergence_depth for name, result in found.items()}
        | {f"{name}_accuracy": value for name, value in best.items()}
        | {f"{name}_jump": _or_none(result.jump_depth) for name, result in found.items()}
        | {
            "clear": min(
                best[name] - max(shuffled[name], untrained.get(name, 0.0)) for name in found
            )
        },
        null={
            "shuffled_accuracy": max(shuffled.values()),
            "untrained_accuracy": max(untrained.values()),
        },
        n=len(texts),
        interval={
            name: _interval(result, range(len(texts)), seed) for name, result in found.items()
        },
        figure=_figure(found),
        note="A jump of -1: no layer raises accuracy by a tenth. Intervals resample texts.",
    )


@claim(
    says="Noise before the text makes concepts converge deeper",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="60 groups of texts",
    valid="accuracy >= shuffled_accuracy + 0.05",
    expect="shift_low >= 1 and shift_low > chance_shift_high",
    direction="shift_low > 0 and shift > chance_shift_high",
    null={
        "chance_shift": "the same texts, plain, with other folds: how far convergence moves by "
        "chance, its interval by the same bootstrap",
        "shuffled_accuracy": "labels dealt out anew, the best of all depths and tasks",
    },
    thresholds="1: the ledger's, one layer at least; 0.05 above dealt-out labels: ours",
)
def noise_pushes_deeper(lm: LM, seed: int) -> Measured:
    """Mean shift of the convergence depth over the factual and the emotional task, with "aaa" or
    "bbb" before each text, as in the paper's code. The bootstrap draws the same texts for both
    depths. An earlier form asked for a shift by noise or by rounding: two chances, and no null."""
    tasks = {"factual": _factual(seed), "emotional": _emotional(seed)}
    generator = random.Random(seed)
    noisy = {
        name: task._replace(texts=[generator.choice(["aaa", "bbb"]) + text for text in task.texts])
        for name, task in tasks.items()
    }
    return _shift(lm, tasks, {name: task.fit(lm, seed) for name, task in noisy.items()}, seed)


@claim(
    says="Coarser weights make concepts converge deeper",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="60 groups of texts",
    valid="accuracy >= shuffled_accuracy + 0.05",
    expect="shift_low >= 1 and shift_low > chance_shift_high",
    direction="shift_low > 0 and shift > chance_shift_high",
    null={
        "chance_shift": "the same texts, plain, with other folds: how far convergence moves by "
        "chance, its interval by the same bootstrap",
        "shuffled_accuracy": "labels dealt out anew, the best of all depths and tasks",
    },
    thresholds="1: the ledger's, one layer at least; 0.05 above dealt-out labels: ours",
)
def rounding_pushes_deeper(lm: LM, seed: int) -> Measured:
    """The same shift with all matrices of all layers rounded to 4 bits, row by row; the paper's
    are rounded to 8, which moves less. SmolLM2 as it is at hand has been rounded to 4 bits once
    already, in small blocks, which makes the second one harder to see."""
    tasks = {"factual": _factual(seed), "emotional": _emotional(seed)}
    with round_weights.edit(lm, BITS):
        coarse = {name: task.fit(lm, seed) for name, task in tasks.items()}
    return _shift(lm, tasks, coarse, seed)


def _shift(lm: LM, tasks: dict[str, Task], changed: dict[str, xr.Dataset], seed: int) -> Measured:
    """How far a change moves the convergence depth, the mean over tasks, and how far other folds
    do; both by a paired bootstrap on the same texts."""
    read = {name: concept_depth.states(lm, task.texts) for name, task in tasks.items()}
    plain = {name: task.fit(lm, seed, read[name]) for name, task in tasks.items()}
    other = {name: task.fit(lm, seed + 1000, read[name]) for name, task in tasks.items()}
    units = [task.units for task in tasks.values()]

    def moved(after: dict[str, xr.Dataset]) -> resample.Interval:
        pairs = [(plain[name].correct.values, after[name].correct.values) for name in tasks]

        def of(*texts: np.ndarray) -> float:
            depths = [
                [concept_depth.convergence_depth(right[some].mean(axis=0)) for right in pair]
                for pair, some in zip(pairs, texts)
            ]
            return float(np.mean([later - before for before, later in depths]))

        return resample.percentile(of, *units, seed=seed)

    shift, chance = moved(changed), moved(other)
    results = [*plain.values(), *changed.values()]
    named = {"": plain, "changed_": changed}
    return Measured(
        values={"shift": shift.value, "accuracy": min(float(r.accuracy.max()) for r in results)}
        | {
            f"{word}{name}": float(found[name].convergence_depth)
            for word, found in named.items()
            for name in tasks
        },
        null={
            "chance_shift": chance.value,
            "shuffled_accuracy": max(float(r.null.max()) for r in results),
        },
        n=shift.n,
        interval={
            "shift": (shift.low, shift.high),
            "chance_shift": (chance.low, chance.high),
        },
        figure=_figure(plain | {f"{name}, changed": found for name, found in changed.items()}),
        note="Intervals resample texts, statements of two countries together.",
    )


def _factual(seed: int) -> Task:
    """ "The capital of X is Y." Two countries exchange their capitals: both true and both false
    statements are one group, so that no probe has met a country or a capital that it is asked
    about."""
    rows = [row for row in data("capitals").all if row["independent"] and row["capital"]]
    some = random.Random(f"factual {seed}").sample(rows, min(TEXTS // 2, len(rows) // 2 * 2))
    texts, kinds, groups = [], [], []
    for one, two in zip(some[::2], some[1::2]):
        for country, capital, true in ((one, two, 0), (two, one, 0), (one, one, 1), (two, two, 1)):
            texts.append(f"The capital of {country['country']} is {capital['capital']}.")
            kinds.append(true)
            groups.append(one["country"])
    return Task(texts, kinds, groups)


def _emotional(seed: int) -> Task:
    """Film reviews of at most twenty words, as many bad as good."""
    rows = [row for row in data("sst2").all if 4 <= len(row["text"].split()) <= 20]
    generator, texts, kinds = random.Random(f"emotional {seed}"), [], []
    for kind in (0, 1):
        same = [row["text"] for row in rows if row["label"] == kind]
        texts += [f"{text.rstrip(' .')}." for text in generator.sample(same, TEXTS // 2)]
        kinds += [kind] * (TEXTS // 2)
    return Task(texts, kinds)


def _inferential(seed: int) -> Task:
    """Three people flip a coin or do not, in sentences of as many words; whether it is still heads
    up. (Where "does not flip" is longer than "flips", the number of tokens alone told 0.80.)"""
    generator, texts, kinds = random.Random(f"inferential {seed}"), [], []
    for number in range(TEXTS):
        flips = [(number >> i) & 1 for i in (0, 1, 2)]
        acts = [
            f"{name} will {'now' if flip else 'not'} flip the coin."
            for name, flip in zip(generator.sample(PEOPLE, 3), flips)
        ]
        texts.append(f"A coin is heads up. {' '.join(acts)} The coin is still heads up.")
        kinds.append(int(sum(flips) % 2 == 0))
    return Task(texts, kinds)


def _control(task: Task, seed: int) -> Task:
    """The same coin flips, each first person with a kind of its own, dealt out."""
    first = [text.split(". ")[1].split()[0] for text in task.texts]
    some = {*random.Random(f"control {seed}").sample(PEOPLE, len(PEOPLE) // 2)}
    return Task(task.texts, [int(name in some) for name in first])


def _by_length(lm: LM, task: Task) -> float:
    """Share of texts that have the commoner kind among all texts of as many tokens: what a reader
    of the length alone can reach at most."""
    length = np.array([len(ids) for ids in lm.tokenizer(task.texts)["input_ids"]])
    kinds = np.array(task.kinds)
    share = [kinds[length == own].mean() for own in length]
    return float(np.mean([max(one, 1 - one) for one in share]))


def _answered(lm: LM, seed: int) -> list[tiny_twohop.Question]:
    """Two-hop questions that the miniature answers right, in random order, each fact once at each
    hop."""
    asked = [question for question in tiny_twohop.questions(seed) if question.bridge]
    random.Random(f"answered {seed}").shuffle(asked)
    first, second, kept = set(), set(), []
    for start in range(0, len(asked), 512):
        some = asked[start : start + 512]
        said = lm.tokenizer.convert_ids_to_tokens(
            last_logits(lm, [q.prompt for q in some]).argmax(dim=-1).tolist()
        )
        for question, word in zip(some, said):
            known, _, kind = question.prompt.rpartition(" 's ")
            if (
                word == question.answer
                and known not in first
                and (question.bridge, kind) not in second
            ):
                first.add(known)
                second.add((question.bridge, kind))
                kept.append(question)
    return kept


def _untrained(lm: LM, seed: int) -> LM:
    """The same architecture with weights as they are before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blank = type(lm.model)(lm.model.config).eval()
    return models.wrap(blank, lm.tokenizer)


def _interval(result: xr.Dataset, units: Sequence[Any], seed: int) -> tuple[float, float]:
    """95 % of the convergence depths of resampled texts."""
    correct = result.correct.values
    depth = lambda texts: concept_depth.convergence_depth(correct[texts].mean(axis=0))  # noqa: E731
    found = resample.percentile(depth, units, seed=seed)
    return found.low, found.high


def _or_none(depth: xr.DataArray) -> float:
    return -1.0 if np.isnan(float(depth)) else float(depth)


def _figure(found: dict[str, xr.Dataset]) -> xr.DataArray:
    """Accuracy by depth, one line for each task."""
    return label(
        np.stack([result.accuracy.values for result in found.values()]),
        ("example", "depth"),
        name="accuracy",
        method="layers.concept_depth",
        coords={"example": list(found), "depth": next(iter(found.values())).depth.values},
    )
