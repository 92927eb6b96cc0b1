"""Prompt pairs with answers and foils, drawn for the tokenizer at hand: one file for each task.

    made = tasks.ioi.task(lm.tokenizer, 32, seed=0)        # or tasks.task("ioi")(lm.tokenizer, 32,
                                                           0)
    tasks.accuracy(lm, made)                               # can the model do it at all? ask before
                                                           explaining
    activation_patching.measure(lm, made.clean, corrupt=made.corrupt, answer=made.answer_ids,
    foil=made.foil_ids)

A file here that defines `task(tokenizer, n, seed)` is a task; there is no list to edit.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from stratoscope._lazy import lazy
from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Task as Task

if TYPE_CHECKING:
    from stratoscope.lab.tasks._accuracy import accuracy as accuracy
else:
    __getattr__, __dir__ = lazy(__name__, __path__, accuracy=f"{__name__}._accuracy")


def names() -> list[str]:
    """Every task there is."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def task(name: str) -> Callable[..., Task]:
    """The function `task(tokenizer, n, seed)` of a task. Raises InputError, with the nearest names,
    if there is none."""
    if name not in names():
        near = get_close_matches(name, names(), 3) or names()
        raise InputError(f"there is no task {name!r}; nearest: {', '.join(near)}.")
    return import_module(f"{__name__}.{name}").task
