"""Questions with several choices: published formats, one scorer, and the controls beside it.

items = benchmarks.formats.read("arc.jsonl")
scores = benchmarks.likelihood.score(lm, items)          # logprob[item, choice], right[item]
benchmarks.likelihood.score(lm, items, save="scores.part")   # interrupted, the same call goes on
benchmarks.controls.score(lm, items)["accuracy"]         # oracle, chance, position, blind ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

AXES = {
    "item": "one question of a benchmark",
    "choice": "one of the answers that a question offers",
    "control": "a way to answer that needs no understanding, or all of it",
}

if TYPE_CHECKING:
    from stratoscope.benchmarks._item import Item as Item
else:
    __getattr__, __dir__ = lazy(__name__, __path__, Item=f"{__name__}._item")
