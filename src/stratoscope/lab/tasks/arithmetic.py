"""Simple arithmetic: sums of two numbers up to nine, after two worked examples."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.lab.tasks._task import Pair, Task, fitted

SUMS = [(a, b) for a in range(1, 8) for b in range(1, 10 - a)]


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs. Raises InputError when the tokenizer does not write a digit after "=" as one
    token."""

    def draw(generator: random.Random) -> Pair:
        a, b = generator.choice(SUMS)
        other = generator.choice([c for c in range(1, 10 - a) if c != b])
        examples = generator.sample([(x, y) for x, y in SUMS if x != a], 2)
        shown = "".join(f"{x}+{y}={x + y}\n" for x, y in examples)
        return Pair(f"{shown}{a}+{b}=", f"{shown}{a}+{other}=", str(a + b), str(a + other))

    story = """Two worked sums and a third to do; all sums are one digit. The corrupt prompt has
        another second addend, and the foil is the sum with it. A guesser of digits is the top
        answer about one time in eight."""
    source = "Stolfo et al. 2023, arXiv:2305.15054"
    return fitted("arithmetic", tokenizer, n, seed, draw, story=story, source=source)
