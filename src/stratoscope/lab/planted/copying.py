"""One head that looks from the asking word to the only name in the prompt, and says that name."""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, ASK, FLAG, WORD, Canvas
from stratoscope.lab.planted.truth import Planted, Variant

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"]
FILLERS = ["the", "sat", "tea", "warm", "drank", "slowly", "by", "window", "rain", "then"]
LAYER, HEAD = 1, 3


def copy_head(seed: int = 0) -> Planted:
    """GPT-2: after "who", the next word is the name that stands in the prompt."""
    canvas = Canvas("gpt2", [*NAMES, *FILLERS, "who"], seed)
    canvas.flag(NAMES, FLAG)
    canvas.flag(["who"], ASK)
    canvas.head((LAYER, HEAD), canvas.match([ASK], [FLAG]), source=WORD, target=ANSWER)
    return Planted(
        name="copy_head",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="by the window Eve drank warm tea who",
        corrupt="by the window Dan drank warm tea who",
        answer="Eve",
        foil="Dan",
        heads=frozenset({(LAYER, HEAD)}),
        neurons=frozenset(),
        edges=frozenset({("embed", "L1H3.v"), ("L1H3", "logits")}),
        attention=frozenset({(LAYER, HEAD, 7, 3)}),
        positions=(3, 7),
        story='At the word "who" (ASK) head L1H3 attends to the word that is marked as a name '
        "(FLAG). "
        "It copies that word from WORD to ANSWER at the last position; at other positions it has "
        "no aim.",
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    before, after = (generator.choices(FILLERS, k=generator.randint(1, 6)) for _ in range(2))
    names = generator.sample(NAMES, 2)
    clean, corrupt = (" ".join([*before, name, *after, "who"]) for name in names)
    return Variant(clean, corrupt, *names)
