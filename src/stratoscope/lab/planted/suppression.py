"""A head that says a name, and a later head that sees which name was said and speaks against it."""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, ASK, FLAG, WORD, Canvas
from stratoscope.lab.planted.copying import FILLERS, NAMES
from stratoscope.lab.planted.truth import Planted, Variant

MOVER, AGAINST = (0, 2), (1, 1)
SAID, TAKEN_BACK = 1.5, -0.5  # of ANSWER: logits 15 and -5


def suppression(seed: int = 0) -> Planted:
    """Llama: copies the only name, and takes a third of it back (copy suppression, as in GPT-2's
    head 10.7)."""
    canvas = Canvas("llama", [*NAMES, *FILLERS, "who"], seed)
    canvas.flag(NAMES, FLAG)
    canvas.flag(["who"], ASK)
    canvas.head(MOVER, canvas.match([ASK], [FLAG]), source=WORD, target=ANSWER, strength=SAID)
    canvas.head(
        AGAINST, canvas.match(ANSWER, WORD), source=WORD, target=ANSWER, strength=TAKEN_BACK
    )
    return Planted(
        name="suppression",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="rain by the window Finn drank warm tea who",
        corrupt="rain by the window Hana drank warm tea who",
        answer="Finn",
        foil="Hana",
        heads=frozenset({MOVER}),
        neurons=frozenset(),
        edges=frozenset({("embed", "L0H2.v"), ("L0H2", "logits")}),
        opposing_heads=frozenset({AGAINST}),
        opposing_edges=frozenset(
            {("embed", "L1H1.k"), ("embed", "L1H1.v"), ("L0H2", "L1H1.q"), ("L1H1", "logits")}
        ),
        attention=frozenset({(*MOVER, 8, 4), (*AGAINST, 8, 4)}),
        positions=(4, 8),
        story='At "who" (ASK) head L0H2 attends to the name (FLAG) and copies it to ANSWER, for a '
        "logit of 15. "
        "Head L1H1 looks for the word that ANSWER holds, and writes that word's WORD against "
        "ANSWER, for a logit "
        "of -5. Where that word does not stand in the prompt, it looks everywhere and writes next "
        "to nothing.",
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    before, after = (generator.choices(FILLERS, k=generator.randint(2, 6)) for _ in range(2))
    names = generator.sample(NAMES, 2)
    clean, corrupt = (" ".join([*before, name, *after, "who"]) for name in names)
    return Variant(clean, corrupt, *names)
