"""The models that are open, and what has been explained: one explanation at a time for each model,
and clicks beside it.

A click must not wait for an explanation, and two threads cannot share one model's hooks. So each
model is open twice: a second set of modules over the same weights, which takes no memory of its
own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event as Flag
from threading import Lock
from typing import TYPE_CHECKING, Any

from stratoscope.errors import InputError
from stratoscope.workbench.state import State

if TYPE_CHECKING:
    from stratoscope.models.lm import LM
    from stratoscope.report.explanation import Explanation

Event = dict[str, Any]  # a line of `stream`
OPEN, MADE, HELD = 2, 12, 24  # models held at once, explanations, and what clicks ask again


class Cancelled(Exception):
    """The person has gone away, or asked for something else."""


@dataclass(slots=True)
class Lane:
    """A model that one thread may use at a time."""

    lm: LM
    lock: Any = field(default_factory=Lock)
    held: OrderedDict[tuple[str, ...], Any] = field(default_factory=OrderedDict)

    def once(self, name: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """What was made under this name, or is now; of HELD things the oldest goes."""
        if name not in self.held:
            self.held[name] = make()
            while len(self.held) > HELD:
                self.held.popitem(last=False)
        return self.held[name]

    @contextmanager
    def taken(self, stop: Flag, waits: Callable[[], object] = lambda: None) -> Iterator[LM]:
        """The model, once no other thread has it. waits: called where there is one. Raises
        Cancelled when `stop` is set meanwhile."""
        if not self.lock.acquire(blocking=False):
            waits()
            while not self.lock.acquire(timeout=0.1):
                if stop.is_set():
                    raise Cancelled
        try:
            yield self.lm
        finally:
            self.lock.release()


class Desk:
    """names: the models that may be opened, the first is the one to begin with. load: opens one.
    texts: a corpus, for the top texts of a unit."""

    def __init__(
        self, names: Sequence[str], load: Callable[[str], LM], texts: Sequence[str] = ()
    ) -> None:
        self.names, self.texts = tuple(names), list(texts)
        self._load, self._lock = load, Lock()
        self._open: OrderedDict[str, tuple[Lane, Lane]] = OrderedDict()
        self._made: OrderedDict[State, tuple[Explanation, list[Event]]] = OrderedDict()

    def lanes(self, name: str) -> tuple[Lane, Lane]:
        """A model twice, for explanations and for clicks; of more than OPEN models the one that was
        not used for longest is closed. Raises InputError for a name that was not given: no other
        path is ever opened."""
        if name not in self.names:
            raise InputError(
                f"model {name!r:.80}: this was started with {', '.join(self.names)}. Start it "
                "again with --model for another."
            )
        with self._lock:
            if name not in self._open:
                while len(self._open) >= OPEN:
                    self._open.popitem(last=False)
                lm = self._load(name)
                self._open[name] = Lane(lm), Lane(beside(lm))
            self._open.move_to_end(name)
            return self._open[name]

    def made(self, state: State) -> Explanation | None:
        """What was explained already, whatever unit was looked at."""
        found = self._made.get(replace(state, unit=""))
        return found and found[0]

    def drawn(self, state: State) -> list[Event]:
        """Its parts as they were drawn; none where it was not explained to its end."""
        return self._made.get(replace(state, unit=""), (None, []))[1]

    def keep(self, state: State, explanation: Explanation, drawn: Sequence[Event]) -> None:
        with self._lock:
            self._made[replace(state, unit="")] = explanation, list(drawn)
            while len(self._made) > MADE:
                self._made.popitem(last=False)


def beside(lm: LM) -> LM:
    """The same model again: its own modules, so its own hooks, over the same weights."""
    from stratoscope.models import wrap

    shared = [*lm.model.parameters(), *lm.model.buffers()]
    return wrap(copy.deepcopy(lm.model, {id(x): x for x in shared}), lm.tokenizer)
