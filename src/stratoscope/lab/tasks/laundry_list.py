"""Laundry list: of several things named, all but one are named again; the answer is the one that is
missing."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

THINGS = (
    "shirt hat coat book cup pen ball phone bag lamp key ring clock box plate chair mirror watch"
).split()
PROMPT = "I packed a {0}, a {1}, a {2}, and a {3}. Then I took out {again}. All that is left is the"
SHORT = "I bought a {0}, a {1}, and a {2}. I lost {again}. All that I have left is the"


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs, of three things or four. Raises InputError when the tokenizer splits the things."""
    things = one_token(tokenizer, THINGS, "things", need=5)

    def draw(generator: random.Random) -> Pair:
        prompt, size = generator.choice([(PROMPT, 4), (SHORT, 3)])
        listed = generator.sample(things, size)
        missing, other, *rest = generator.sample(listed, size)
        # None: the one that tells the prompts apart
        order = generator.sample([None, *rest], size - 1)
        clean, corrupt = (
            prompt.format(*listed, again=" and ".join(f"the {thing or gone}" for thing in order))
            for gone in (other, missing)
        )
        return Pair(clean, corrupt, f" {missing}", f" {other}")

    story = """Three or four things are listed, and all but one of them named again, in any order:
        the answer is the one left over. In the corrupt prompt another one is left over, the foil. A
        guesser who names one of the things listed is the top answer a quarter to a third of the
        time; one who always copies the thing not just named does better."""
    source = "after Merullo et al. 2024, arXiv:2406.09519 (Laundry List); this wording is our own"
    return fitted("laundry_list", tokenizer, n, seed, draw, story=story, source=source)
