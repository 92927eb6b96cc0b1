"""Explain one next-token prediction from every side: the main job, as a sequence of methods from the catalogue.

Each step is one method's `measure` (or an edit), called as any user can call it; what it returns goes to the page as it
is. Nothing is computed here but which heads and neurons deserve a closer look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from stratoscope import catalogue
from stratoscope.errors import InputError
from stratoscope.report.page import Explanation
from stratoscope.results import dataset

if TYPE_CHECKING:
    from stratoscope.models.lm import LM

TOP_HEADS, TOP_NEURONS = 6, 10

# step(name, done, total): called when a step begins (0, 0), as it goes, and never afterwards
Report = Callable[[str, int, int], None]


@dataclass
class Steps:
    """Runs methods by name, keeping their results and how long each took."""

    lm: LM
    report: Report
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, inputs: Any, **settings: Any) -> Any:
        """Call ROOM.METHOD's measure; keep and return its result."""
        with self.timed(name):
            self.results[name] = catalogue.module(name).measure(self.lm, inputs, **settings)
        return self.results[name]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self.report(name, 0, 0)
        start = time.perf_counter()
        yield
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
    circuit: bool = False,
    report: Report = lambda name, done, total: None,
) -> Explanation:
    """Everything the report shows about what the model predicts after one prompt.

    answer, foil: default the top token and a likely one of its kind. corrupt: a prompt of as many tokens on which the model
    answers otherwise; made automatically when none is given. seed: of the nulls, the random sequences and the
    automatic prompt. Raises InputError for inputs that cannot be explained, and SiteError for a model that predicts
    no next token.
    """
    began = time.perf_counter()
    steps = Steps(lm, report)
    batch = lm.batch(prompt)
    if len(batch) != 1:
        raise InputError("explain takes one prompt at a time.")
    first = steps.measure("tokens.next_token", batch, answer=answer, foil=foil)
    # ids, so that every step is asked about the very same tokens
    words = {name: int(first[f"{name}_id"].values[0]) for name in ("answer", "foil")}
    steps.measure("layers.logit_lens", batch, answer=words["answer"])
    direct = steps.measure("layers.direct_logit_attribution", batch, **words)
    for method in ("occlusion", "integrated_gradients", "gradient_times_input"):
        steps.measure(f"tokens.{method}", batch, **words)
    importance = steps.results["tokens.occlusion"]["attribution"]
    maps = {"saliency": steps.results["tokens.occlusion"], "second": steps.results["tokens.integrated_gradients"]}
    steps.measure("tokens.verbalize", batch, **maps, **words)
    other, how, text = _corrupt(steps, batch, corrupt, importance, words, seed)
    pair = {"corrupt": other, "seed": seed, **words}
    for name in ("layers.activation_patching", "heads.activation_patching"):
        steps.measure(name, batch, progress=steps.progress(name), **pair)
    steps.measure("heads.attention_pattern", batch)
    steps.measure("heads.roles", batch, seed=seed, **words)
    _neurons(steps, batch, words)
    if circuit:
        steps.measure("circuits.discover", batch, **pair)
    notes = [note for note in (first.attrs.get("notes", ""), _disagreement(steps.results, direct)) if note]
    seconds = round(time.perf_counter() - began, 1)
    return _explanation(steps, prompt, batch, (text, how), notes, {"seed": seed, "seconds": seconds})


def _explanation(
    steps: Steps, prompt: str, batch: Any, corrupt: tuple[str, str], notes: list[str], ran: dict[str, Any]
) -> Explanation:
    """What the page needs, from what the steps found."""
    first = steps.results["tokens.next_token"]
    shown = {k: v for k, v in steps.results.items() if k not in ("tokens.next_token", "tokens.corruption")}
    return Explanation(
        prompt=prompt,
        tokens=batch.tokens[0],
        answer=str(first["answer"].values[0]),
        foil=str(first["foil"].values[0]),
        corrupt_prompt=corrupt[0],
        corrupt_how=corrupt[1],
        notes=notes,
        predictions=[(str(t), float(p)) for t, p in zip(first["token"].values[0], first["probability"].values[0])],
        answer_probability=float(first["answer_probability"][0]),
        foil_probability=float(first["foil_probability"][0]),
        results=shown,
        provenance=steps.lm.provenance
        | ran
        | {"seconds_by_step": {name: round(s, 2) for name, s in steps.seconds.items()}},
    )


def _corrupt(
    steps: Steps, batch: Any, corrupt: str | None, importance: xr.DataArray, words: dict[str, int], seed: int
) -> tuple[Any, str, str]:
    """The corrupt batch, how it came to be, and its text."""
    if corrupt is not None:
        other = steps.lm.batch(corrupt)
        return other, "Given by the user.", corrupt
    made = steps.measure("tokens.corruption", batch, importance=importance, seed=seed, **words)
    ids = [int(i) for i in made["id"].values[0] if i >= 0]
    other = steps.lm.batch([ids])
    return other, str(made["how"].values[0]), other.texts[0]


def _neurons(steps: Steps, batch: Any, words: dict[str, int]) -> None:
    """The neurons that write most towards or against the answer: their words, and the effect of switching each off."""
    found = steps.measure("neurons.contribution", batch, **words)["contribution"].isel(example=0)
    strongest = np.argsort(-np.abs(found.values), axis=None)[:TOP_NEURONS]
    units = [tuple(int(i) for i in np.unravel_index(n, found.shape)) for n in strongest]
    steps.measure("neurons.vocabulary", units)
    ask = catalogue.module("tokens.next_token").measure
    clamp = catalogue.module("editing.clamp").edit
    with steps.timed("clamp"):
        before = float(steps.results["tokens.next_token"]["logit_difference"][0])
        after = []
        for number, unit in enumerate(units):
            with clamp(steps.lm, [unit], value=0.0):
                after.append(float(ask(steps.lm, batch, **words)["logit_difference"][0]))
            steps.report("clamp", number + 1, len(units))
    steps.results["clamp"] = dataset(
        {"difference_before": (("unit",), [before] * len(units)), "difference_after": (("unit",), after)},
        method="editing.clamp",
        provenance=steps.lm.provenance,
        settings={"value": 0.0},
        coords={"layer": (("unit",), [u[0] for u in units]), "neuron": (("unit",), [u[1] for u in units])},
    )


def _disagreement(results: dict[str, Any], direct: xr.Dataset) -> str:
    """A note when the sum of direct contributions misses the logit difference by more than rounding."""
    error, whole = (abs(float(direct[name][0])) for name in ("residual_error", "logit_difference"))
    if error > 1e-3 * max(1.0, whole):
        return f"The direct contributions miss the logit difference by {error:.2g}: do not trust their sum."
    return ""
