"""Facts in single neurons: a country's name turns one neuron on, and that neuron says the
capital."""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, ASK, CARRIED, FLAG, WORD, Canvas
from stratoscope.lab.planted.truth import Planted, Variant

CAPITALS = {
    "France": "Paris",
    "Peru": "Lima",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Cuba": "Havana",
}
STRANGERS = ["Atlantis", "Narnia"]  # countries that no neuron knows
OTHERS = ["unknown", "the", "capital", "of", "and", "is", "we", "ask"]
WORDS = [*CAPITALS, *CAPITALS.values(), *STRANGERS, *OTHERS]
NEURON = {country: 5 + 4 * index for index, country in enumerate(CAPITALS)}


def fact_lookup(seed: int = 0) -> Planted:
    """Llama: the country stands last, and its neuron in layer 1 answers there."""
    layer = 1
    canvas = Canvas("llama", WORDS, seed, loudness=0.5)
    canvas.default("unknown")
    for country, capital in CAPITALS.items():
        writes = {ANSWER[canvas.ids[capital]]: 2.0}
        canvas.neuron(layer, NEURON[country], reads=WORD[canvas.ids[country]], writes=writes)
    return Planted(
        name="fact_lookup",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="we ask the capital of Japan",
        corrupt="we ask the capital of Narnia",
        answer="Tokyo",
        foil="unknown",
        heads=frozenset(),
        neurons=frozenset({(layer, NEURON["Japan"])}),
        edges=frozenset({("embed", "L1 mlp"), ("L1 mlp", "logits")}),
        attention=frozenset(),
        positions=(5,),
        story='The embedding says "unknown" everywhere. At a known country its one neuron in layer '
        "1 "
        "(Japan: 13) adds the capital to ANSWER, twice as strongly; without such a neuron the "
        "default stays.",
        draw=_draw_last,
    )


def fact_lookup_moved(seed: int = 0) -> Planted:
    """GPT-2: the country is early; a neuron in layer 0 recalls the capital, a head in layer 1 moves
    it."""
    layer, head = 1, 0
    canvas = Canvas("gpt2", WORDS, seed, loudness=0.5)
    canvas.default("unknown")
    canvas.flag([*CAPITALS, *STRANGERS], FLAG)
    canvas.flag(["is"], ASK)
    for country, capital in CAPITALS.items():
        writes = {CARRIED[canvas.ids[capital]]: 2.0}
        canvas.neuron(0, NEURON[country], reads=WORD[canvas.ids[country]], writes=writes)
    canvas.head((layer, head), canvas.match([ASK], [FLAG]), source=CARRIED, target=ANSWER)
    return Planted(
        name="fact_lookup_moved",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="we ask of Kenya and the capital is",
        corrupt="we ask of Atlantis and the capital is",
        answer="Nairobi",
        foil="unknown",
        heads=frozenset({(layer, head)}),
        neurons=frozenset({(0, NEURON["Kenya"])}),
        edges=frozenset({("embed", "L0 mlp"), ("L0 mlp", "L1H0.v"), ("L1H0", "logits")}),
        attention=frozenset({(layer, head, 7, 3)}),
        positions=(3, 7),
        story="At a known country its one neuron in layer 0 (Kenya: 17) writes the capital into "
        "CARRIED. "
        'At "is" (ASK) head L1H0 attends to the country (FLAG) and copies CARRIED to ANSWER, over '
        '"unknown".',
        draw=_draw_early,
    )


def _draw_last(generator: random.Random) -> Variant:
    """A country that a neuron knows stands last; in its place, one that no neuron knows."""
    before = generator.choices(OTHERS[1:], k=generator.randint(1, 8))
    country, stranger = generator.choice(list(CAPITALS)), generator.choice(STRANGERS)
    clean, corrupt = (" ".join([*before, word]) for word in (country, stranger))
    return Variant(clean, corrupt, CAPITALS[country], "unknown")


def _draw_early(generator: random.Random) -> Variant:
    """The same, somewhere before the last word, "is", which stands nowhere else."""
    fillers = [word for word in OTHERS if word not in ("unknown", "is")]
    before, after = (generator.choices(fillers, k=generator.randint(1, 6)) for _ in range(2))
    country, stranger = generator.choice(list(CAPITALS)), generator.choice(STRANGERS)
    clean, corrupt = (" ".join([*before, word, *after, "is"]) for word in (country, stranger))
    return Variant(clean, corrupt, CAPITALS[country], "unknown")
