"""Docstring: the next parameter of a Python function's docstring is the next in its signature."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

NAMES = (
    "load size files port name line user date model path text value key index file table "
    "token "
    "state mode"
).split()
WORDS = (
    "sky river crime column piece population unit dark summer garden oil winter music bread "
    "stone paper"
).split()


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs. Raises InputError when the tokenizer splits the names of parameters."""
    names = one_token(tokenizer, NAMES, "names of parameters", need=6)

    def draw(generator: random.Random) -> Pair:
        function, *arguments = generator.sample(names, 5)
        words = generator.sample(WORDS, 6)
        swapped = [*arguments[:2], arguments[3], arguments[2]]
        clean, corrupt = (
            f"def {function}(self, {', '.join(order)}):\n"
            f'    """{words[0]} {words[1]}\n\n'
            f"    :param {arguments[0]}: {words[2]} {words[3]}\n"
            f"    :param {arguments[1]}: {words[4]} {words[5]}\n"
            f"    :param"
            for order in (arguments, swapped)
        )
        return Pair(clean, corrupt, f" {arguments[2]}", f" {arguments[3]}")

    story = """A function of four parameters whose docstring has described the first two: the answer
        is the third, the foil the fourth. In the corrupt prompt these two change places in the
        signature."""
    source = "Heimersheim and Janiak 2023, A circuit for Python docstrings"
    return fitted("docstring", tokenizer, n, seed, draw, story=story, source=source)
