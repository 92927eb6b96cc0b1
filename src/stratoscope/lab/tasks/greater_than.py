"""Greater-than: what ends in the same century ends in a later year."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, next_token, one_token

NOUNS = """war trip journey project program campaign dispute strike study course reign siege
conflict partnership expedition voyage tour trial""".split()
CENTURIES = range(11, 20)
TEMPLATE = "The {noun} lasted from the year {century}{start:02d} to the year {century}"


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs; the compared tokens are two digits, or the first of two where the tokenizer writes
    digits singly.

    Raises InputError when the tokenizer splits the nouns, or writes years in a way that has no such
    tokens.
    """
    nouns = one_token(tokenizer, NOUNS, "nouns", need=3)
    probe = TEMPLATE.format(noun=nouns[0], century=17, start=42)
    single = next_token(tokenizer, probe, "05") is None  # then the next token is a tens digit
    steps, lowest, highest = (10, 0, 90) if single else (1, 2, 98)

    def draw(generator: random.Random) -> Pair:
        start = generator.randint(20, 79)
        whole = start // steps * steps
        answer, foil = (
            generator.randrange(low, high, steps)
            for low, high in ((whole + steps, highest + 1), (lowest, whole))
        )
        words = {"noun": generator.choice(nouns), "century": generator.choice(CENTURIES)}
        clean, corrupt = (TEMPLATE.format(**words, start=year) for year in (start, 1))
        endings = [str(year // 10) if single else f"{year:02d}" for year in (answer, foil)]
        return Pair(clean, corrupt, *endings)

    story = """Something lasts from a year of a century to a year of the same century: the answer
        continues it to a later year, the foil to an earlier one. In the corrupt prompt the first
        year ends in 01, so that both are later. The answer is always the larger number: a model
        that simply prefers large numbers has accuracy 1, and shift_accuracy 0.5."""
    return fitted(
        "greater_than",
        tokenizer,
        n,
        seed,
        draw,
        story=story,
        source="Hanna et al. 2023, arXiv:2305.00586",
    )
