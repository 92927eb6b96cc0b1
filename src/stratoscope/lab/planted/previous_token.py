"""One head that looks back by one position and says the word it finds there."""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, WORD, Canvas
from stratoscope.lab.planted.truth import Planted, Variant

WORDS = ["ash", "bay", "cliff", "dale", "elm", "fen", "glen", "hill", "isle", "jetty"]
WORDS += ["knoll", "lake", "moor", "oak", "pond", "reef", "sand", "tarn", "vale", "weir"]
LAYER, HEAD = 0, 1


def previous_token_head(seed: int = 0) -> Planted:
    """Llama (4 query heads, 2 key/value heads): the next word is the word before the current
    one."""
    canvas = Canvas("llama", WORDS, seed)
    canvas.head((LAYER, HEAD), canvas.look_back(), source=WORD, target=ANSWER)
    return Planted(
        name="previous_token_head",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="moor glen fen oak lake hill",
        corrupt="moor glen fen oak reef hill",
        answer="lake",
        foil="reef",
        heads=frozenset({(LAYER, HEAD)}),
        neurons=frozenset(),
        edges=frozenset({("embed", "L0H1.v"), ("L0H1", "logits")}),
        attention=frozenset((LAYER, HEAD, query, query - 1) for query in range(1, 6)),
        positions=(4, 5),
        story="At every position head L0H1 attends to the position before, by constant queries and "
        "keys "
        "on fast rotary pairs. It copies that word from WORD to ANSWER: the model says the word "
        "before last.",
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    *before, last = generator.choices(WORDS, k=generator.randint(2, 12))
    words = generator.sample(WORDS, 2)
    clean, corrupt = (" ".join([*before, word, last]) for word in words)
    return Variant(clean, corrupt, *words)
