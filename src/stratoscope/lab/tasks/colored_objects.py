"""Colored objects: three things of three colours; which colour has one of them?"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

COLOURS = "red blue green black white brown yellow pink".split()
THINGS = "book cup pen ball box plate key ring phone bag hat lamp".split()
PROMPT = (
    "Q: On the table, there is a {0} {3}, a {1} {4}, and a {2} {5}. What color is the "
    "{target}?\nA: The {target} is"
)


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs. Raises InputError when the tokenizer splits the colours or the things."""
    colours, things = (
        one_token(tokenizer, x, what, need=4)
        for x, what in ((COLOURS, "colours"), (THINGS, "things"))
    )

    def draw(generator: random.Random) -> Pair:
        shades, objects = generator.sample(colours, 3), generator.sample(things, 3)
        right, wrong = generator.sample(range(3), 2)
        clean, corrupt = (
            PROMPT.format(*shades, *objects, target=objects[which]) for which in (right, wrong)
        )
        return Pair(clean, corrupt, f" {shades[right]}", f" {shades[wrong]}")

    story = """Three things with their colours, and a question for the colour of one. The corrupt
        prompt asks for another, whose colour is the foil. A guesser who names one of the three
        colours is the top answer a third of the time."""
    source = "BIG-bench reasoning_about_colored_objects; Merullo et al. 2024, arXiv:2310.08744"
    return fitted("colored_objects", tokenizer, n, seed, draw, story=story, source=source)
