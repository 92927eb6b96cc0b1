"""Explain one next-token prediction from every side: the main job, as a sequence of methods from
the catalogue.

Each step is one method's `measure` (or an edit), called as any user can call it; what it returns
goes to the page as it is. Nothing is computed here but which heads and neurons deserve a closer
look. A step that refuses (a model without heads that can be seen, a prompt without a word to
exchange) leaves its reason in its place, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stratoscope import catalogue
from stratoscope.errors import InputError, StratoscopeError
from stratoscope.plots.text import percent
from stratoscope.report.explanation import LEFT_OUT, Explanation
from stratoscope.report.steps import STEPS as STEPS

if TYPE_CHECKING:
    from stratoscope.models.lm import LM

TOP_NEURONS, RANDOM_NEURONS = 10, 20
LITTLE = 0.01  # of all probability: less than any trained model gives to its ten likeliest tokens
SHAPLEY_TOKENS = 20  # of a longer prompt these passes would be most of the report's time

# report(name, done, total): called when a step begins (0, 0) and as it goes
Report = Callable[[str, int, int], None]


@dataclass
class Steps:
    """Runs methods by name: their results, why one is missing, how long each took."""

    lm: LM
    report: Report
    skip: Collection[str] = ()
    results: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, *inputs: Any, **settings: Any) -> Any:
        """Call ROOM.METHOD's measure; keep and return its result, or None where it refuses or is
        skipped."""
        if name in self.skip:
            self.missing[name] = LEFT_OUT
            return None
        with self.step(name):
            self.results[name] = catalogue.module(name).measure(self.lm, *inputs, **settings)
        return self.results.get(name)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is done inside; a refusal becomes the reason why the result is missing."""
        start = time.perf_counter()
        try:
            self.report(name, 0, 0)
            yield
        except StratoscopeError as error:
            self.missing[name] = str(error)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(name, done, total)


def explain(
    lm: LM,
    prompt: str,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    corrupt: str | None = None,
    seed: int = 0,
    whole: bool = False,
    circuit: bool = False,
    skip: Collection[str] = (),
    report: Report = lambda name, done, total: None,
    keep: Callable[[Explanation], object] = lambda so_far: None,
) -> Explanation:
    """Everything the report shows about what the model predicts after one prompt.

    answer: default the top token. foil: default a likely token of its kind, chosen together with
    the corrupt prompt where that is made automatically. whole: score the texts of answer and foil
    with all their tokens (`metric.Whole`); what can ask about one token only says so in its place.
    corrupt: a prompt of as many tokens on which the model answers otherwise. seed: of the nulls,
    the random sequences and the automatic prompt. skip: names of STEPS to leave out. keep: called
    with what is there after every step. Raises InputError for inputs that cannot be explained, and
    SiteError for a model that predicts no next token.
    """
    began = time.perf_counter()
    if unknown := sorted(set(skip) - set(STEPS[1:])):
        raise InputError(
            f"skip {unknown}: the steps that can be left out are {', '.join(STEPS[1:])}."
        )
    if whole and (answer is None or foil is None):
        raise InputError("a whole answer is compared with a whole foil: give both as texts.")
    steps = Steps(lm, report, skip)
    batch = lm.batch(prompt)
    if len(batch) != 1:
        raise InputError("explain takes one prompt at a time.")
    other, how = _given(lm, batch, corrupt) if corrupt is not None else (None, "")
    given = {"answer": answer, "foil": foil}

    def so_far() -> Explanation:
        ran = {"seed": seed, "seconds": round(time.perf_counter() - began, 1)}
        return replace(_explanation(steps, prompt, batch, question, ran), whole=whole)

    question = _asked(steps, batch, other, how, given, whole)
    keep(so_far())
    steps.measure("layers.logit_lens", batch, answer=question.words["answer"])
    keep(so_far())  # before the search for a corrupt prompt, which takes longer
    question = _settled(steps, batch, question, given, seed, whole)
    for run in _rest(steps, batch, question.other, question.words, seed, circuit):
        run()
        keep(so_far())
    return so_far()


class Question(NamedTuple):
    """What is asked: answer and foil as every step takes them, the corrupt prompt (None without
    one), how it was made, why this foil, and notes of the words as they were given."""

    words: dict[str, Any]
    other: Any
    how: str
    why: str
    notes: str


def _asked(
    steps: Steps, batch: Any, other: Any, how: str, given: dict[str, Any], whole: bool
) -> Question:
    """Answer and foil, those that are not given chosen by themselves; without an answer there is no
    report, so what `next_token` raises is raised."""
    method = catalogue.module("tokens.next_token")
    texts = {name: method.Whole(text) for name, text in given.items()} if whole else given
    steps.report("tokens.next_token", 0, 0)
    began = time.perf_counter()
    first = method.measure(steps.lm, batch, **texts)
    steps.seconds["tokens.next_token"] = time.perf_counter() - began
    steps.results["tokens.next_token"] = first
    # of the words as they were given; below, ids are asked
    notes = str(first.attrs.get("notes", ""))
    why = str((first.attrs.get("foil_why") or [""])[0])
    return Question(texts if whole else _ids(first), other, how, why, notes)


def _settled(
    steps: Steps, batch: Any, asked: Question, given: dict[str, Any], seed: int, whole: bool
) -> Question:
    """The same with a corrupt prompt, where none was given, and the foil that it leads to."""
    lm, method = steps.lm, catalogue.module("tokens.next_token")
    first = steps.results["tokens.next_token"]
    answer, foil = int(first["answer_id"].values[0]), given["foil"]
    if whole:  # prompts are made by the first tokens
        foil = int(first["foil_id"].values[0])
    if foil is None and asked.other is not None:
        foil = catalogue.module("tokens.corruption").led_to(lm, asked.other, answer)
        first = method.measure(lm, batch, answer=answer, foil=foil)
        asked = asked._replace(why=str((first.attrs.get("foil_why") or [""])[0]))
    made = None
    if asked.other is None:
        made = steps.measure("tokens.corruption", batch, answer=answer, foil=foil, seed=seed)
    if made is not None:
        other = lm.batch([[int(i) for i in made["id"].values[0] if i >= 0]])
        asked = asked._replace(other=other, how=str(made["how"].values[0]))
        asked = asked._replace(why=str(made["foil_why"].values[0]) or asked.why)
        if not whole:
            foil = int(made["foil_id"].values[0])
            first = method.measure(lm, batch, answer=answer, foil=foil)
    steps.results["tokens.next_token"] = first
    return asked if whole else asked._replace(words=_ids(first))


def _ids(first: Any) -> dict[str, int]:
    return {name: int(first[f"{name}_id"].values[0]) for name in ("answer", "foil")}


def _rest(
    steps: Steps, batch: Any, other: Any, words: dict[str, Any], seed: int, circuit: bool
) -> Iterator[Callable[[], object]]:
    """The steps after the question is settled, in the order of STEPS."""

    def run(name: str, *inputs: Any, **settings: Any) -> Callable[[], object]:
        return lambda: steps.measure(name, *(inputs or (batch,)), **settings)

    yield run("layers.direct_logit_attribution", **words)
    yield run("tokens.occlusion", **words)
    if batch.ids is not None and (length := batch.ids.shape[1]) > SHAPLEY_TOKENS:
        steps.missing["tokens.shapley"] = (
            f"{length} tokens would take {length * 32:,} passes; the report asks them of at most "
            f"{SHAPLEY_TOKENS}. `stratoscope measure tokens.shapley` asks them of any."
        )
    else:
        yield run("tokens.shapley", seed=seed, progress=steps.progress("tokens.shapley"), **words)
    yield lambda: _in_words(steps, batch, words)
    pair = {"corrupt": other, "seed": seed, **words}
    for name in ("layers.activation_patching", "heads.activation_patching"):
        if other is None:
            steps.missing[name] = "there is no corrupt prompt. " + steps.missing.get(
                "tokens.corruption", ""
            )
        else:
            yield run(name, progress=steps.progress(name), **pair)
    yield run("heads.attention_pattern")
    yield run("heads.roles", seed=seed, **words)
    yield run("neurons.contribution", **words)
    if (contribution := steps.results.get("neurons.contribution")) is not None:
        effect = contribution["contribution"].isel(example=0).values
        strongest = np.argsort(-np.abs(effect), axis=None)[:TOP_NEURONS]
        units = [tuple(int(i) for i in np.unravel_index(n, effect.shape)) for n in strongest]
        yield run("neurons.vocabulary", units)
        yield lambda: _clamp(steps, batch, words, units, seed)
    if circuit and other is not None:
        yield run("circuits.discover", **pair)


def _in_words(steps: Steps, batch: Any, words: dict[str, Any]) -> None:
    """The paragraph, by occlusion, and a second opinion where there is one."""
    saliency = steps.results.get("tokens.occlusion")
    if saliency is None and "tokens.verbalize" not in steps.skip:
        steps.missing["tokens.verbalize"] = "it needs tokens.occlusion."
        return
    second = steps.results.get(catalogue.module("tokens.verbalize").SECOND)
    steps.measure("tokens.verbalize", batch, saliency=saliency, second=second, **words)


def _given(lm: LM, batch: Any, corrupt: str) -> tuple[Any, str]:
    """The user's corrupt prompt, refused before any work where it cannot be patched token by
    token."""
    other = lm.batch(corrupt)
    if len(other.tokens[0]) != len(batch.tokens[0]):
        raise InputError(
            f"the prompt has {len(batch.tokens[0])} tokens and --corrupt {len(other.tokens[0])}: "
            "patching pairs token "
            f"with token, so both need the same number of tokens. {list(batch.tokens[0])}; "
            f"{list(other.tokens[0])}."
        )
    if bool((other.ids == batch.ids).all()):
        raise InputError(
            "--corrupt is the prompt itself: there is nothing to restore. Exchange a word of it."
        )
    return other, "Given by the user."


def _explanation(
    steps: Steps, prompt: str, batch: Any, question: Question, ran: dict[str, Any]
) -> Explanation:
    """What the page needs, from what the steps found so far."""
    first, (_, other, how, why, rival_note) = steps.results["tokens.next_token"], question
    shown = {
        k: v
        for k, v in steps.results.items()
        if k not in ("tokens.next_token", "tokens.corruption")
    }
    notes = [_undecided(first["probability"].values[0], steps.lm.readout.size)]
    notes += [rival_note, _disagreement(shown.get("layers.direct_logit_attribution"))]
    # of pairs that run the other way, and of rounding that is as large as an effect
    patched = (
        shown[name]
        for name in ("layers.activation_patching", "heads.activation_patching")
        if name in shown
    )
    notes += [str(result.attrs.get("notes", "")) for result in patched]
    return Explanation(
        prompt=prompt,
        tokens=batch.tokens[0],
        answer=str(first["answer"].values[0]),
        foil=str(first["foil"].values[0]),
        words=question.words,
        foil_how=why,
        corrupt_prompt=other.texts[0] if other is not None else None,
        corrupt_how=how,
        notes=list(dict.fromkeys(filter(None, notes))),
        missing=dict(steps.missing),
        predictions=[
            (str(t), float(p))
            for t, p in zip(first["token"].values[0], first["probability"].values[0])
        ],
        answer_probability=float(first["answer_probability"][0]),
        foil_probability=float(first["foil_probability"][0]),
        results=shown,
        provenance=steps.lm.provenance
        | ran
        | {"seconds_by_step": {name: round(s, 2) for name, s in steps.seconds.items()}},
    )


def _clamp(steps: Steps, batch: Any, words: dict[str, Any], units: list[Any], seed: int) -> None:
    """The effect of switching each of these neurons off, and of random ones of the same layers as
    the null."""
    if "clamp" in steps.skip:
        steps.missing["clamp"] = LEFT_OUT
        return
    how = {"draws": RANDOM_NEURONS, "seed": seed, "progress": steps.progress("clamp"), **words}
    with steps.step("clamp"):
        ablation = (
            catalogue.module("neurons.ablation")
            .measure(steps.lm, batch, units=units, **how)
            .isel(example=0)
        )
        before, effect = ablation["difference"], ablation["effect"]
        steps.results["clamp"] = ablation.assign(
            difference_before=before.broadcast_like(effect),
            difference_after=before - effect,
            null_change=-ablation["null"],
        )


def _undecided(likeliest: np.ndarray, words: int) -> str:
    """A note when the model hardly prefers one word to another: an untrained one, or one that was
    loaded wrongly. likeliest: the probabilities of the likeliest of that many words."""
    share, count = float(likeliest.sum()), len(likeliest)
    if share >= max(LITTLE, 1.5 * count / words if 2 * count < words else 0.0):
        return ""
    return (
        f"The model hardly prefers one token to another: the {count} likeliest of {words:,} hold "
        f"{percent(share)} together. An untrained model is like this, or one whose weights were "
        "not all loaded. What follows says why one of many is just ahead, and that may be noise."
    )


def _disagreement(direct: Any) -> str:
    """A note when the sum of direct contributions misses the logit difference by more than
    rounding."""
    if direct is None:
        return ""
    error, whole = (abs(float(direct[name][0])) for name in ("residual_error", "logit_difference"))
    if error > 1e-3 * max(1.0, whole):
        return (
            f"The direct contributions miss the logit difference by {error:.2g}: do not trust "
            "their sum."
        )
    return ""
