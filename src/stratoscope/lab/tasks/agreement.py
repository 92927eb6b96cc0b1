"""Subject-verb agreement: the verb follows the subject's number, not that of the noun next to
it."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, enough, fitted, next_token

NOUNS = """key:keys teacher:teachers doctor:doctors picture:pictures student:students book:books
author:authors driver:drivers friend:friends actor:actors""".split()
ATTRACTORS = (
    "cabinet:cabinets table:tables house:houses school:schools building:buildings "
    "car:cars garden:gardens"
).split()
BETWEEN = ("near", "behind", "next to", "in front of")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs, half with a plural subject. Raises InputError when the tokenizer splits the
    nouns."""
    nouns, attractors = (
        _in_both_numbers(tokenizer, *given)
        for given in ((NOUNS, "nouns"), (ATTRACTORS, "attractor nouns"))
    )

    def draw(generator: random.Random) -> Pair:
        number, noun, verbs = (
            generator.randrange(2),
            generator.choice(nouns),
            generator.choice(VERBS),
        )
        rest = f"{generator.choice(BETWEEN)} the {generator.choice(attractors)[1 - number]}"
        clean, corrupt = (f"The {noun[which]} {rest}" for which in (number, 1 - number))
        return Pair(clean, corrupt, verbs[number], verbs[1 - number])

    story = """A subject, a noun next to it of the other number (the attractor), then the verb,
        which must agree with the subject. The corrupt prompt has the subject in the other number;
        the attractor stays, and there agrees with it."""
    return fitted(
        "agreement",
        tokenizer,
        n,
        seed,
        draw,
        story=story,
        source="Linzen et al. 2016, arXiv:1611.01368",
    )


def _in_both_numbers(
    tokenizer: PreTrainedTokenizerBase, words: list[str], what: str
) -> list[list[str]]:
    """[singular, plural] of those nouns that are one token in both numbers."""
    pairs = [word.split(":") for word in words]
    usable = [
        pair
        for pair in pairs
        if all(next_token(tokenizer, "the", f" {word}") is not None for word in pair)
    ]
    return enough(usable, pairs, f"{what}, in both numbers", need=3)
