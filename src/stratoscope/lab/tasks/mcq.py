"""Multiple choice, with shuffled labels or in order: name the letter of the right one among four
options."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Pair, Task, fitted, one_token

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTIONS = {
    "Which of these is an animal?": (
        "dog horse cat cow lion",
        "table window car spoon hammer river shirt",
    ),
    "Which of these is a color?": (
        "red blue green yellow purple",
        "chair apple music water doctor bread train",
    ),
    "Which of these is a fruit?": (
        "apple banana orange grape lemon",
        "shoe knife paper door clock bridge tiger",
    ),
    "Which of these is a country?": (
        "France Japan Brazil Egypt Canada",
        "Paris Tuesday summer pencil carrot violin",
    ),
    "Which of these is a number?": (
        "seven three nine four eight",
        "happy garden bottle winter pillow orange",
    ),
    "Which of these is a metal?": (
        "iron gold silver copper lead",
        "cotton milk wood glass paper butter wool",
    ),
    "Which of these is a day of the week?": (
        "Monday Friday Sunday Tuesday",
        "April London winter noon dinner June",
    ),
    "Which of these is a month?": (
        "June April March July October",
        "Friday Rome evening river lunch Monday",
    ),
    "Which of these is part of the body?": (
        "hand foot nose ear knee",
        "coat lamp stone cloud plate ticket",
    ),
    "Which of these is hot?": ("fire lava flame", "ice snow frost winter glacier"),
}


def task(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    *,
    ordered: bool = False,
    shots: int = 0,
) -> Task:
    """n pairs. Raises InputError when the tokenizer does not write a letter as one token.

    ordered: the options are labelled A B C D, in this order, as in an exam; else by four random
    letters in random order. shots: solved questions before each, the same for all of them; their
    right options stand at different places as long as there are places.
    """
    labels = one_token(tokenizer, LABELS, "labels", need=4)
    if shots < 0:
        raise InputError(f"shots={shots}: that many solved questions, 0 or more.")
    if ordered and labels[:4] != list(LABELS[:4]):
        raise InputError(f"ordered: A, B, C and D are not all one token here; {labels[:4]} are.")

    def question_at(generator: random.Random, at: int) -> Pair:
        """A question whose right option stands at `at`."""
        question, (right, wrong) = generator.choice(list(QUESTIONS.items()))
        options = generator.sample(wrong.split(), 3)
        options.insert(at, generator.choice(right.split()))
        there = generator.choice([place for place in range(4) if place != at])
        swapped = options.copy()
        swapped[at], swapped[there] = options[there], options[at]
        letters = labels[:4] if ordered else generator.sample(labels, 4)
        clean, corrupt = (
            f"Question: {question}\n"
            + "".join(f"{letter}. {option}\n" for letter, option in zip(letters, order))
            + "Answer:"
            for order in (options, swapped)
        )
        return Pair(clean, corrupt, f" {letters[at]}", f" {letters[there]}")

    first = random.Random(f"shots {seed}")
    places = first.sample(range(4), 4)
    solved = [question_at(first, places[number % 4]) for number in range(shots)]
    before = "".join(f"{one.clean}{one.answer}\n\n" for one in solved)

    def draw(generator: random.Random) -> Pair:
        clean, corrupt, answer, foil = question_at(generator, generator.randrange(4))
        return Pair(before + clean, before + corrupt, answer, foil)

    labelled = (
        "labelled A B C D" if ordered else "labelled with four random letters in random order"
    )
    story = f"""A question and four options, {labelled}; the
        answer is the letter of the right one. In the corrupt prompt the right option and another
        change places, and the foil is the letter it then has. A guesser of one of the four letters
        is the top answer a quarter of the time."""
    if shots:
        story += f" {shots} solved questions stand before each, the same for all."
    source = "Lieberum et al. 2023, arXiv:2307.09458"
    return fitted("mcq", tokenizer, n, seed, draw, story=story, source=source)
