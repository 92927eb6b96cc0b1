"""Indirect object identification: of two names, the one that does not act is the one that
receives."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

NAMES = """Mary John Tom James Dan Martin Amy Sarah Emma Anna David Peter Paul Mark Kate Alice Jack
Robert Michael Lisa Laura George Simon Adam Kevin Rachel Lucy Grace Henry Frank""".split()
PLACES = "store park school office garden station restaurant hospital beach library".split()
THINGS = "drink book ring letter basket computer bone ball key gift".split()
# one and other: the two names, in either order (ABBA and BABA); again: the one that acts
TEMPLATES = (
    "When {one} and {other} went to the {place}, {again} gave a {thing} to",
    "Then, {one} and {other} had a long talk at the {place}. Afterwards, {again} decided to give a "
    "{thing} to",
    "While {one} and {other} were working at the {place}, {again} found a {thing} and showed it to",
)


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs over three templates, both orders of the names. Raises InputError when the tokenizer
    splits the names."""
    names = one_token(tokenizer, NAMES, "names", need=4)

    def draw(generator: random.Random) -> Pair:
        one, other = generator.sample(names, 2)
        again, answer = generator.sample([one, other], 2)
        words = {
            "one": one,
            "other": other,
            "place": generator.choice(PLACES),
            "thing": generator.choice(THINGS),
        }
        template = generator.choice(TEMPLATES)
        clean, corrupt = (template.format(**words, again=name) for name in (again, answer))
        return Pair(clean, corrupt, f" {answer}", f" {again}")

    story = """Two people are named, then one of them again, who gives something to: the other. In
        the corrupt prompt the other person gives, so that answer and foil change places. Both names
        stand in both prompts, in the same order."""
    return fitted(
        "ioi", tokenizer, n, seed, draw, story=story, source="Wang et al. 2022, arXiv:2211.00593"
    )
