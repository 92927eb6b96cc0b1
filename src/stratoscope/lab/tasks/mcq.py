"""Multiple choice with shuffled labels: name the letter of the right one among four options."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

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


def task(tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Task:
    """n pairs. Raises InputError when the tokenizer does not write a letter as one token."""
    labels = one_token(tokenizer, LABELS, "labels", need=4)

    def draw(generator: random.Random) -> Pair:
        question, (right, wrong) = generator.choice(list(QUESTIONS.items()))
        options = [generator.choice(right.split()), *generator.sample(wrong.split(), 3)]
        generator.shuffle(options)
        at = next(place for place, option in enumerate(options) if option in right.split())
        there = generator.choice([place for place in range(4) if place != at])
        swapped = options.copy()
        swapped[at], swapped[there] = options[there], options[at]
        letters = generator.sample(labels, 4)
        clean, corrupt = (
            f"Question: {question}\n"
            + "".join(f"{letter}. {option}\n" for letter, option in zip(letters, order))
            + "Answer:"
            for order in (options, swapped)
        )
        return Pair(clean, corrupt, f" {letters[at]}", f" {letters[there]}")

    story = """A question and four options, labelled with four random letters in random order; the
        answer is the letter of the right one. In the corrupt prompt the right option and another
        change places, and the foil is the letter it then has. A guesser of one of the four letters
        is the top answer a quarter of the time."""
    source = "Lieberum et al. 2023, arXiv:2307.09458"
    return fitted("mcq", tokenizer, n, seed, draw, story=story, source=source)
