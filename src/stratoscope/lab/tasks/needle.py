"""Needle: one sentence hidden in a long text, asked for in other words than its own."""

from __future__ import annotations

import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Pair, Task, fitted, new_generator, one_token

PLACES = "castle lighthouse garden library hospital station museum theatre bridge harbor".split()
ANIMALS = """tiger horse wolf bear fox deer lion monkey snake goat rabbit cow dog cat pig duck
sheep mouse frog bird""".split()
STATEMENT = "\nThe animal that lives in the {} is the"
QUESTION = "\nQuestion: Which animal would you meet at the {}?\nAnswer: You would meet a"
HAYSTACK = """The grass is green. The sky is blue. The sun is yellow. Here we go. There and back
again. """.replace("\n", " ")  # filler that says nothing, as passkey tests use it


class Needle(NamedTuple):
    """statement + answer is what is hidden, question what is asked; the word before the answer is
    not the question's last one, so that what followed that word before is not the answer."""

    statement: str
    answer: str
    question: str


def needles(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> list[Needle]:
    """n different needles, whose answers are one token. Raises InputError when there are not so
    many, or the tokenizer splits the animals."""
    generator, animals = new_generator("needle", n, seed), _animals(tokenizer)
    every = [(place, animal) for place in PLACES for animal in animals]
    if n > len(every):
        raise InputError(f"{n} needles were asked for; there are {len(every)} different ones.")
    chosen = generator.sample(every, n)
    return [Needle(STATEMENT.format(p), f" {animal}", QUESTION.format(p)) for p, animal in chosen]


def task(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    *,
    haystack: str = 4 * HAYSTACK,
    depth: float = 0.5,
) -> Task:
    """n pairs. haystack: the text that hides the needle; depth: after how much of its letters, 0 to
    1. Raises InputError for another depth, or when the tokenizer splits the animals."""
    animals, at = _animals(tokenizer), round(depth * len(haystack))
    if not 0 <= depth <= 1:
        raise InputError(f"depth={depth}: 0, before the haystack, to 1, after it.")

    def draw(generator: random.Random) -> Pair:
        place, (animal, other) = generator.choice(PLACES), generator.sample(animals, 2)
        clean, corrupt = (
            f"{haystack[:at]}{STATEMENT.format(place)} {word}\n{haystack[at:]}"
            f"{QUESTION.format(place)}"
            for word in (animal, other)
        )
        return Pair(clean, corrupt, f" {animal}", f" {other}")

    story = """An animal of some place is named in the midst of a text and asked for at its end, in
        other words; in the corrupt prompt it is another animal, the foil. A guesser who names one
        of the animals is the top answer once in so many times. That the place in question is found
        again is not shown: there is but one animal in the text."""
    source = "after Wu et al. 2024, arXiv:2404.15574 (needle in a haystack); wording our own"
    return fitted("needle", tokenizer, n, seed, draw, story=story, source=source)


def _animals(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return one_token(tokenizer, ANIMALS, "animals", need=4)
