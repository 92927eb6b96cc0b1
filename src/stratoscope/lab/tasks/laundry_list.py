"""Laundry list: of several things named, all but one are named again; the answer is the one that is
missing."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

THINGS = (
    "shirt hat coat book cup pen ball phone bag lamp key ring clock box plate chair mirror watch"
).split()
PROMPT = "I packed a {listed}, and a {last}. Then I took out {again}. All that is left is the"
SHORT = "I bought a {0}, a {1}, and a {2}. I lost {again}. All that I have left is the"


def task(
    tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, *, sizes: Sequence[int] = (3, 4)
) -> Task:
    """n pairs; sizes: how many things are listed, each as likely as the others. The more there are,
    the harder it is. Raises InputError when the tokenizer splits the things, or fewer than three
    are asked for."""
    things = one_token(tokenizer, THINGS, "things", need=max(5, *sizes))
    if min(sizes) < 3:
        raise InputError(f"sizes={tuple(sizes)}: a list has at least three things.")

    def draw(generator: random.Random) -> Pair:
        size = generator.choice(tuple(sizes)[::-1])
        prompt = SHORT if size == 3 else _long(size)
        listed = generator.sample(things, size)
        missing, other, *rest = generator.sample(listed, size)
        # None: the one that tells the prompts apart
        order = generator.sample([None, *rest], size - 1)
        clean, corrupt = (
            prompt.format(*listed, again=" and ".join(f"the {thing or gone}" for thing in order))
            for gone in (other, missing)
        )
        return Pair(clean, corrupt, f" {missing}", f" {other}")

    written = " or ".join(str(size) for size in sizes)
    story = f"""{written} things are listed, and all but one of them named again, in any order: the
        answer is the one left over. In the corrupt prompt another one is left over, the foil. A
        guesser who names one of the things listed is the top answer once in so many times; one
        who always copies the thing not just named does better."""
    source = "after Merullo et al. 2024, arXiv:2406.09519 (Laundry List); this wording is our own"
    return fitted("laundry_list", tokenizer, n, seed, draw, story=story, source=source)


def _long(size: int) -> str:
    """The prompt with so many places for things."""
    places = ", a ".join(f"{{{number}}}" for number in range(size - 1))
    return PROMPT.replace("{listed}", places).replace("{last}", f"{{{size - 1}}}")
