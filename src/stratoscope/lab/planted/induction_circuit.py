"""Two heads in two layers that continue a sequence seen before: A B ... A -> B.

The first word of a prompt has no word before it: the previous-token head can only see that word
itself, and writes it as its own predecessor. When A is the very first word, half the attention
therefore stays on A; the prompts here avoid that.
"""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, CARRIED, WORD, Canvas, Family
from stratoscope.lab.planted.truth import Planted, Variant

WORDS = ["arm", "belt", "cup", "door", "ear", "fork", "gate", "hat", "ink", "jar"]
WORDS += ["key", "lamp", "mat", "net", "oar", "pen", "quilt", "rug", "soap", "tray"]
PREVIOUS, MATCH = (0, 1), (1, 2)


def induction(seed: int = 0) -> Planted:
    """The induction circuit in a Llama with rotary positions and grouped queries (4 on 2 keys)."""
    return _induction("llama", "induction", seed)


def induction_gpt2(seed: int = 0) -> Planted:
    """The induction circuit in a GPT-2 with learned positions."""
    return _induction("gpt2", "induction_gpt2", seed)


def _induction(family: Family, name: str, seed: int) -> Planted:
    canvas = Canvas(family, WORDS, seed)
    canvas.head(PREVIOUS, canvas.look_back(), source=WORD, target=CARRIED)
    canvas.head(MATCH, canvas.match(WORD, CARRIED), source=WORD, target=ANSWER)
    return Planted(
        name=name,
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        # the two first words of the pairs change places: queries and values stay, only L0H1's
        # output differs
        clean="soap key lamp mat hat pen jar key",
        corrupt="soap hat lamp mat key pen jar key",
        answer="lamp",
        foil="pen",
        heads=frozenset({PREVIOUS, MATCH}),
        neurons=frozenset(),
        edges=frozenset({("embed", "L0H1.v"), ("L0H1", "L1H2.k"), ("L1H2", "logits")}),
        attention=frozenset(
            {(*PREVIOUS, query, query - 1) for query in range(1, 8)} | {(*MATCH, 7, 2)}
        ),
        positions=(1, 2, 7),
        story="Head L0H1 writes into CARRIED, at every position, which word stands before. "
        "Head L1H2 asks with its own WORD for the position whose CARRIED is that word, and copies "
        "the "
        "WORD there to ANSWER.",
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    """Different words with two pairs among them, never first; the first words of the pairs change
    places."""
    words = generator.sample(WORDS, generator.randint(5, 14))
    here, there = sorted(generator.sample(range(1, len(words) - 1), 2))
    if there == here + 1:  # pairs must not overlap: the second moves on by one, over a new word
        words.insert(there, generator.choice([word for word in WORDS if word not in words]))
        there += 1
    swapped = words.copy()
    swapped[here], swapped[there] = words[there], words[here]
    again = words[generator.choice([here, there])]
    clean, corrupt = (" ".join([*order, again]) for order in (words, swapped))
    answer, foil = (order[order.index(again) + 1] for order in (words, swapped))
    return Variant(clean, corrupt, answer, foil)
