"""Two facts in a row: a person's country in layer 0, that country's capital in layer 1."""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import ANSWER, CARRIED, WORD, Canvas
from stratoscope.lab.planted.truth import Planted, Variant

HOMES = {
    "Marie": "Poland",
    "Jan": "Poland",
    "Yuki": "Japan",
    "Kenji": "Japan",
    "Luis": "Peru",
    "Wanjiru": "Kenya",
}
CAPITALS = {"Poland": "Warsaw", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi"}
STRANGERS = ["Nobody", "Someone"]  # people that no neuron knows
OTHERS = ["unknown", "the", "capital", "of", "home", "and"]
FIRST = {person: 4 + 5 * index for index, person in enumerate(HOMES)}
SECOND = {country: 6 + 7 * index for index, country in enumerate(CAPITALS)}


def two_hop(seed: int = 0) -> Planted:
    """Llama: the person stands last; the answer needs the neurons of the person and of the
    country."""
    canvas = Canvas(
        "llama", [*HOMES, *CAPITALS, *CAPITALS.values(), *STRANGERS, *OTHERS], seed, loudness=0.5
    )
    canvas.default("unknown")
    ids = canvas.ids
    for person, country in HOMES.items():
        canvas.neuron(
            0, FIRST[person], reads=WORD[ids[person]], writes={CARRIED[ids[country]]: 1.0}
        )
    for country, capital in CAPITALS.items():
        canvas.neuron(
            1, SECOND[country], reads=CARRIED[ids[country]], writes={ANSWER[ids[capital]]: 2.0}
        )
    return Planted(
        name="two_hop",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="the capital of the home of Yuki",
        corrupt="the capital of the home of Nobody",
        answer="Tokyo",
        foil="unknown",
        heads=frozenset(),
        neurons=frozenset({(0, FIRST["Yuki"]), (1, SECOND["Japan"])}),
        edges=frozenset({("embed", "L0 mlp"), ("L0 mlp", "L1 mlp"), ("L1 mlp", "logits")}),
        attention=frozenset(),
        positions=(6,),
        story="The person's neuron in layer 0 (Yuki: 14) writes the home country into CARRIED, "
        "unseen by the "
        "unembedding. The country's neuron in layer 1 (Japan: 13) reads that and adds the capital "
        "to ANSWER, "
        'twice as strongly as the default "unknown".',
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    """A person that a neuron knows stands last; in their place, one that no neuron knows."""
    before = generator.choices(OTHERS[1:], k=generator.randint(1, 8))
    person, stranger = generator.choice(list(HOMES)), generator.choice(STRANGERS)
    clean, corrupt = (" ".join([*before, word]) for word in (person, stranger))
    return Variant(clean, corrupt, CAPITALS[HOMES[person]], "unknown")
