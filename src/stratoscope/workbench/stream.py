"""An explanation as it is made: what runs now, and each section of the report once it can be drawn.

`explain` reports every step and hands over what it has after each; both become events. An event is
a dict: `step` (what runs, number `at` of `of`, seconds `left` where they are known), `head` and
`section` (HTML), `done`, or `error` (a text for the person).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Event as Flag
from threading import Thread
from typing import Any

from stratoscope.errors import StratoscopeError
from stratoscope.report import page, sheet
from stratoscope.report.explain import explain
from stratoscope.report.explanation import LEFT_OUT, Explanation
from stratoscope.report.section import missing
from stratoscope.report.sections import SECTIONS, TITLES, section_of
from stratoscope.report.steps import FAST, NAMES, STEPS
from stratoscope.workbench import look
from stratoscope.workbench.desk import Cancelled, Desk, Event, Lane
from stratoscope.workbench.state import State

Tell = Callable[[Event], object]


def explained(desk: Desk, state: State, tell: Tell, stop: Flag) -> None:
    """Explain, telling every event, to `done`, an `error`, or until `stop` is set."""
    try:
        if desk.made(state) is None:
            _explain(desk, state, tell, stop)
        else:
            for event in desk.drawn(state):
                tell(event)
        tell({"done": True})
    except Cancelled:
        pass
    except StratoscopeError as error:
        tell({"error": str(error)})
    except Exception as error:  # a fault of ours must not leave the page waiting
        tell({"error": f"Unexpected {type(error).__name__}: {error}"})
        raise


def _explain(desk: Desk, state: State, tell: Tell, stop: Flag) -> None:
    tell({"step": f"opening {state.model}"})
    lane, quick = desk.lanes(state.model)
    drawn = Drawn()
    left_out = {"circuits.discover", *(FAST if state.quick else ())}
    report = Progress(tell, stop, [step for step in STEPS if step not in left_out])

    def keep(so_far: Explanation) -> None:
        first = not drawn.last
        for event in drawn.new(so_far):
            tell(event)
        if first:  # the person sees a picture, and may click soon
            Thread(target=_warm, args=(quick, state), daemon=True).start()

    with lane.taken(stop, lambda: tell({"step": "waiting for another tab's explanation"})) as lm:
        skip = FAST if state.quick else ()
        made = explain(lm, state.prompt, **state.question, skip=skip, report=report, keep=keep)
    keep(made)
    desk.keep(state, made, [*drawn.last.values()])


def _warm(lane: Lane, state: State) -> None:
    with suppress(StratoscopeError), lane.taken(Flag()) as lm:
        look.warm(lm, state, lane.once)


class Progress:
    """`explain`'s report as events, and the place where it is cancelled."""

    def __init__(self, tell: Tell, stop: Flag, order: list[str]) -> None:
        self.tell, self.stop, self.order = tell, stop, order
        self.began = self.told = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Cancelled
        now = time.perf_counter()
        if not total:
            self.began = self.told = now
        elif now - self.told < 0.25:
            return
        self.told = now
        at = self.order.index(name) + 1 if name in self.order else len(self.order)
        event: Event = {"step": NAMES.get(name, name), "at": at, "of": len(self.order)}
        if done:
            event["left"] = round((now - self.began) * (total - done) / done, 1)
        self.tell(event)


class Drawn:
    """The parts of the page: each is drawn again only when there is more of it. last: each as it
    was drawn last, in the order of the page."""

    def __init__(self) -> None:
        self.last: dict[str, Event] = {}
        self._state: dict[str, tuple[Any, ...]] = {}

    def new(self, e: Explanation) -> Iterator[Event]:
        """What is new since the explanation that was given before."""
        of_head = (e.answer, e.foil, e.foil_how, tuple(e.notes), "tokens.verbalize" in e.results)
        if self._changed("head", of_head):
            what = page.headline(e) | {"pending": "tokens.verbalize" not in e.missing}
            self.last["head"] = {"head": sheet.fragment("head.html", e=e, **what)}
            yield self.last["head"]
        found = page.papers(e)
        for name, (keys, _) in SECTIONS.items():
            have = tuple(key for key in keys if key in e.results)
            lacks = tuple(key for key in keys if e.missing.get(key, LEFT_OUT) != LEFT_OUT)
            drawable = have or lacks or name == "prediction"  # whose first picture needs no method
            words = (e.answer, e.foil) if have or name == "prediction" else ()
            if not drawable or not self._changed(name, (have, lacks, words)):
                continue
            section = section_of(e, name)
            section.missing = [missing(e, key) for key in lacks if key not in e.results]
            shown = {"id": name, "title": TITLES[name], "number": "", "s": section}
            html = sheet.fragment("section.html", **shown, e=e, found=found[name])
            self.last[name] = {"section": name, "html": html}
            yield self.last[name]

    def _changed(self, name: str, state: tuple[Any, ...]) -> bool:
        before, self._state[name] = self._state.get(name), state
        return before != state
