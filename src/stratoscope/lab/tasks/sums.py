"""Sums or differences of two small numbers after worked examples, in digits or in words."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Pair, Task, fitted

NUMBERS = "zero one two three four five six seven eight nine".split()
Problem = tuple[int, int]


def problems(operation: str = "+", half: int | None = None) -> list[Problem]:
    """The operands whose result is one to nine, all of them or, for half 0 or 1, every second of a
    shuffle. Raises InputError for another operation or half."""
    if operation not in ("+", "-") or half not in (None, 0, 1):
        raise InputError(f"operation={operation!r}, half={half!r}: '+' or '-', and 0, 1 or None.")
    every = [
        (a, b) for a in range(1, 10) for b in range(1, 10) if 1 <= result(operation, a, b) < 10
    ]
    random.Random("halves").shuffle(every)
    return every if half is None else every[half::2]


def result(operation: str, a: int, b: int) -> int:
    return a + b if operation == "+" else a - b


def task(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    *,
    operation: str = "+",
    shots: int = 4,
    words: bool = False,
    half: int | None = None,
) -> Task:
    """n pairs. half: of what is asked; worked examples are of half 0 then, so that those of half 1
    are shown nowhere with their result. Raises InputError when the tokenizer does not write a
    result as one token."""
    asked = problems(operation, half)
    shown = problems(operation, None if half is None else 0)

    def draw(generator: random.Random) -> Pair:
        one, other = generator.sample(asked, 2)
        both = {result(operation, *one), result(operation, *other)}
        free = [p for p in shown if result(operation, *p) not in both]
        before = generator.sample(free, shots)
        lines = "".join(line(operation, *p, words, solved=True) for p in before)
        prompts = [lines + line(operation, *p, words) for p in (one, other)]
        answers = [written(result(operation, *p), words) for p in (one, other)]
        return Pair(*prompts, *answers)

    story = """Worked problems and one more to do; all results are one digit, and no worked one has
        a result that is asked for. The corrupt prompt asks for other operands. A guesser of digits
        is the top answer about one time in nine."""
    source = "Zhang et al. 2024, arXiv:2409.01659"
    return fitted("sums", tokenizer, n, seed, draw, story=story, source=source)


def written(number: int, words: bool) -> str:
    """A result as it follows the prompt."""
    return f" {NUMBERS[number]}" if words else str(number)


def line(operation: str, a: int, b: int, words: bool, *, solved: bool = False) -> str:
    """One problem, up to its result; solved: with it."""
    if words:
        name = {"+": "plus", "-": "minus"}[operation]
        text = f"{NUMBERS[a]} {name} {NUMBERS[b]} is"
    else:
        text = f"{a}{operation}{b}="
    return f"{text}{written(result(operation, a, b), words)}\n" if solved else text
