"""The same questions for a program that asks in words: text in, text out (`stratoscope mcp`).

Every answer states the effect beside its null (`report.brief`), and what the method does not show.
Nothing is written; of files only results of the folder given are read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from stratoscope import catalogue
from stratoscope.errors import InputError, MethodError
from stratoscope.report import sections
from stratoscope.report.brief import TOP, brief, does_not_show
from stratoscope.report.explain import explain
from stratoscope.report.section import missing
from stratoscope.report.steps import FAST
from stratoscope.workbench import files, look
from stratoscope.workbench.desk import Desk
from stratoscope.workbench.state import State
from stratoscope.workbench.unit import Unit

HELD = frozenset({"save", "progress", "directory", "folder", "out", "path"})  # they reach files
LISTED = 40


class Agent:
    """The tools. desk: the models that may be asked. folder: whose results may be opened."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk, self.folder = desk, folder

    @property
    def tools(self) -> list[Callable[..., str]]:
        """In the order in which they are listed."""
        return [
            self.models,
            self.methods,
            self.describe,
            self.measure,
            self.explain,
            self.change,
            self.papers,
            self.results,
            self.open_result,
        ]

    def models(self) -> str:
        """The models that can be asked; the first is the default."""
        return "\n".join(self.desk.names)

    def methods(self, search: str = "") -> str:
        """Methods that measure, each with a sentence on what it answers.

        search: words of which one must occur; empty lists them all.
        """
        words = search.lower().split()
        rows = [
            f"{entry.address}: {entry.summary}"
            for entry in catalogue.methods()
            if "measure" in entry.verbs
            and (not words or any(w in f"{entry.address} {entry.summary}".lower() for w in words))
        ]
        return "\n".join(rows) or f"No method speaks of {search!r}. Leave search empty for all."

    def describe(self, method: str) -> str:
        """One method: its equation, how to read it, what it does not show, and its options."""
        entry = catalogue.find(method)
        text = catalogue.docstring(entry.path.read_text("utf-8"))
        options = [
            f"- {p.name}: {inspect.formatannotation(p.annotation)}"
            + ("" if p.default is p.empty else f", default {p.default!r}")
            for p in _options(method).values()
        ]
        return f"{text}\n\nOptions of measure:\n" + ("\n".join(options) or "none")

    def measure(
        self,
        method: str,
        prompts: list[str] | None = None,
        units: list[list[int]] | None = None,
        options: dict[str, Any] | None = None,
        number: str = "",
        top: int = TOP,
        model: str = "",
    ) -> str:
        """Run a method of the list on prompts (or on units, as [layer, neuron] pairs).

        options: keyword options of the method, as `describe` lists them, such as answer and foil.
        number: which of its numbers is told, default the main one. The answer says what chance
        reaches; what is not beyond it is no finding.
        """
        known, given = _options(method), dict(options or {})
        if unknown := sorted(set(given) - set(known)):
            raise MethodError(
                f"{method} has no option {', '.join(unknown)}. Its options: "
                f"{', '.join(known) or 'none'}."
            )
        lacks = [p.name for p in known.values() if p.default is p.empty and p.name not in given]
        if lacks:
            raise MethodError(f"{method} needs the option {', '.join(lacks)}.")
        if bool(prompts) == bool(units):
            raise InputError("give either prompts or units.")
        if not 1 <= top <= LISTED:
            raise InputError(f"top={top}: ask for 1 to {LISTED} entries.")
        lane, _ = self.desk.lanes(self._model(model))
        with lane.taken(Event()) as lm:
            result = catalogue.module(method).measure(lm, prompts or units, **given)
        return brief(result, number or None, top=top)

    def explain(
        self,
        prompt: str,
        answer: str = "",
        foil: str = "",
        corrupt: str = "",
        quick: bool = True,
        model: str = "",
    ) -> str:
        """Why the model goes on with `answer` rather than `foil` (both chosen where empty): the
        findings of the whole report, in sentences.

        quick: without patching, Shapley values and head roles, so without causes of heads; false
        takes about five times as long.
        """
        given = {"prompt": prompt, "answer": answer, "foil": foil, "corrupt": corrupt}
        query = given | {"quick": "1" if quick else "", "model": self._model(model)}
        state = State.read(query, self.desk.names)
        lane, _ = self.desk.lanes(state.model)
        with lane.taken(Event()) as lm:
            e = explain(lm, prompt, **state.question, skip=FAST if quick else ())
        best = ", ".join(f"{token!r} {p:.3g}" for token, p in e.predictions[:5])
        lines = [f"Next token: {best}.", f"Answer {e.answer!r}, foil {e.foil!r}. {e.foil_how}"]
        if e.corrupt_prompt:
            lines.append(f"Corrupt prompt: {e.corrupt_prompt!r}. {e.corrupt_how}")
        if (told := e.one("tokens.verbalize")) is not None:
            lines.append(str(told["text"].item()))
        for name, (keys, _) in sections.SECTIONS.items():
            found = sections.section_of(e, name).finding
            limits = [does_not_show(key) for key in keys if key in e.results]
            if found:
                lines.append(f"{sections.TITLES[name]}: {found}")
                lines += [f"  Does not show: {limit}" for limit in limits if limit][:1]
        lines += [
            f"Not measured: {missing(e, key)}" for key in e.missing if key != "circuits.discover"
        ]
        lines += [f"Note: {note}" for note in e.notes]
        return "\n".join(lines)

    def change(
        self,
        prompt: str,
        unit: str,
        strength: float | None = None,
        answer: str = "",
        foil: str = "",
        corrupt: str = "",
        model: str = "",
    ) -> str:
        """What the model says once a unit is changed: switched off, at its mean, as in the corrupt
        prompt (where one is given), or `strength` times as strong.

        unit: L5H3 a head, L5N12 a neuron, L5M an MLP, L5T4 a token's stream after layer 5, T4 a
        token. Others of its layer, switched off, tell what chance reaches.
        """
        words = {"answer": answer, "foil": foil, "corrupt": corrupt, "unit": unit}
        query = words | {"prompt": prompt, "model": self._model(model)}
        state = State.read(query, self.desk.names)
        _, lane = self.desk.lanes(state.model)
        with lane.taken(Event()) as lm:
            asked = Unit.parse(unit)
            shown = look.changed(lm, state, asked, strength, None, lane.once)
            found = look.chance(lm, state, asked, None, lane.once)
            said = asked.said(lm.batch(prompt))
        lines = [f"{said}; the number is the logit of {shown['answer']!r} less {shown['foil']!r}."]
        reach = max(map(abs, found[:2])) if found else None
        if found is None:
            lines.append("Chance: there are no other units of its kind to compare with.")
        else:
            lines.append(f"Chance: {found[2]} others of its layer, off, reach {reach:.2g}.")
        for row in shown["rows"]:
            told = f"{row['way']}: {row['difference']:+.2f}"
            if row["change"] is not None:
                within = reach is not None and abs(row["change"]) <= reach
                told += f" ({row['change']:+.2f}{', within chance' if within else ''})"
            tokens = ", ".join(f"{token!r} {p:.2g}" for token, p in row["tokens"][:3])
            lines.append(f"{told}; next {tokens}.")
        lines.append("On this prompt alone; a unit whose work another one repeats shows no effect.")
        return "\n".join(lines)

    def papers(self, search: str = "") -> str:
        """What published papers of this field say, and what became of each claim when it was run
        here: reproduced, direction only, not reproduced, no test, or not built.

        search: words that must all occur in the title, key or claim.
        """
        from stratoscope.claims import atlas, ledger

        words, rows = search.lower().split(), []
        for paper in atlas.data(ledger.atlas())["papers"]:
            said = paper.get("says") or paper.get("to_check") or ""
            text = f"{paper['key']}: {paper['title']} ({paper['year']}). {said}"
            if all(word in text.lower() for word in words):
                rows.append(f"{text} [{paper['status']}]")
        more = [f"{len(rows) - LISTED} more: search for something narrower."]
        found = rows[:LISTED] + (more if len(rows) > LISTED else [])
        return "\n".join(found) or f"No paper speaks of {search!r}."

    def results(self) -> str:
        """The saved results (.nc) of the folder."""
        found = [name for name in files.listed(self.folder) if name.endswith(".nc")]
        return "\n".join(found) or "There is no result in the folder."

    def open_result(self, name: str, number: str = "", top: int = TOP) -> str:
        """A saved result of the folder, in words."""
        from stratoscope import results

        path = files.inside(self.folder, name)
        if path.suffix != ".nc":
            raise InputError(f"{name!r:.80} is a page, no result: name a .nc.")
        return brief(results.load(path), number or None, top=top)

    def _model(self, name: str) -> str:
        return name or self.desk.names[0]


def _options(method: str) -> dict[str, inspect.Parameter]:
    """The keyword options of a method's measure that touch no file. Raises MethodError for a method
    that measures nothing."""
    entry = catalogue.find(method)
    if "measure" not in entry.verbs:
        raise MethodError(f"{method} measures nothing: it can only {' and '.join(entry.verbs)}.")
    parameters = inspect.signature(catalogue.module(method).measure).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in HELD}
    return {name: p for name, p in options.items() if not re.search(r"Path|Callable", _kind(p))}


def _kind(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation)
