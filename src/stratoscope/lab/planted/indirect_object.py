"""Indirect object identification in three layers, and a fourth whose only head stands in when the
third is removed.

    then Ada and Ben met ; Ada gave tea to  ->  Ben

Every head here rests on the first word, as many trained heads do: a head with nothing to look for
puts its attention there and, since the first word is no name, copies nothing. A backup must see
that another head said nothing, so it needs a layer of its own after that head.
"""

from __future__ import annotations

import random

from stratoscope.lab.planted.canvas import (
    ANSWER,
    ASK,
    CARRIED,
    CONSTANT,
    FLAG,
    POSITION,
    SHARP,
    WORD,
    Canvas,
)
from stratoscope.lab.planted.truth import Planted, Variant

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus"]
FILLERS = [
    "then",
    "when",
    "and",
    "met",
    "with",
    "at",
    "home",
    ";",
    "later",
    "gave",
    "some",
    "tea",
    "bread",
]
DUPLICATE, INHIBIT, MOVER, BACKUP = (0, 2), (1, 0), (2, 3), (3, 1)
# positions that the duplicate-token head tells apart: 32 dims are 7 names, 24 positions, one to
# rest
LONGEST = 24
FULL, REST = 2 * SHARP, SHARP  # the score of what a head looks for, and of the first word


def indirect_object(seed: int = 0) -> Planted:
    """GPT-2: of two names, the next word is the one that was not said again."""
    canvas = Canvas("gpt2", [*NAMES, *FILLERS, "to"], seed, loudness=0.5, layers=4)
    canvas.flag(NAMES, FLAG)
    canvas.flag(["to"], ASK)
    word, carried, answer = (
        [dims[canvas.ids[name]] for name in NAMES] for dims in (WORD, CARRIED, ANSWER)
    )
    any_carried, minus_carried = dict.fromkeys(carried, 1.0), dict.fromkeys(carried, -1.0)
    rest = (REST, {CONSTANT: 1.0}, {POSITION[0]: 1.0})
    same_name = [(FULL, {dim: 1.0}, {dim: 1.0}) for dim in word]
    not_itself = [(-FULL - REST, {dim: 1.0}, {dim: 1.0}) for dim in POSITION[:LONGEST]]
    not_the_carried = [(-FULL, {one: 1.0}, {other: 1.0}) for one, other in zip(carried, word)]
    first_names = {FLAG: 1.0} | minus_carried  # a name said again carries itself
    # a name in ANSWER puts a head to rest
    answered = 1.5 * FULL, dict.fromkeys(answer, 1.0), {POSITION[0]: 1.0}

    canvas.head(DUPLICATE, canvas.score(*same_name, *not_itself, rest), source=word, target=carried)
    canvas.head(
        INHIBIT, canvas.score((FULL, {ASK: 1.0}, any_carried), rest), source=carried, target=carried
    )
    mover = [(FULL, {ASK: 1.0}, first_names), *not_the_carried, rest]
    canvas.head(MOVER, canvas.score(*mover), source=word, target=answer)
    canvas.head(BACKUP, canvas.score(*mover, answered), source=word, target=answer)
    return Planted(
        name="indirect_object",
        model=canvas.model,
        tokenizer=canvas.tokenizer(),
        clean="then Ada and Ben met ; Ada gave tea to",
        corrupt="then Ada and Ben met ; Ben gave tea to",
        answer="Ben",
        foil="Ada",
        heads=frozenset({DUPLICATE, INHIBIT, MOVER}),
        neurons=frozenset(),
        edges=frozenset(
            {("embed", "L0H2.q"), ("L0H2", "L1H0.v"), ("L1H0", "L2H3.q"), ("L2H3", "logits")}
        ),
        backups=frozenset({(MOVER, BACKUP)}),
        attention=frozenset(
            {(*DUPLICATE, 6, 1), (*INHIBIT, 9, 6), (*MOVER, 9, 3), (*BACKUP, 9, 0)}
        ),
        positions=(6, 9),
        story="At a name said again, head L0H2 attends to where it was said first and writes it "
        "into CARRIED. "
        'At "to" (ASK) head L1H0 attends to the word that carries a name and takes it over into '
        "CARRIED there. "
        "Head L2H3 attends from there to names said for the first time, but not to the one it "
        "carries: it copies "
        "the other one from WORD to ANSWER. Head L3H1 does exactly the same where ANSWER holds no "
        "name yet, and "
        "else rests on the first word: it works only when L2H3 says nothing. Both names stand in "
        "both prompts, so "
        "keys and values of the movers are needed but carry no difference.",
        draw=_draw,
    )


def _draw(generator: random.Random) -> Variant:
    """Either name first (ABBA and BABA), any words between; the first word and the last before "to"
    are no names."""
    one, other = generator.sample(NAMES, 2)
    gaps = [" ".join(generator.choices(FILLERS, k=generator.randint(1, 4))) for _ in range(4)]
    again, answer = generator.sample([one, other], 2)
    clean, corrupt = (
        f"{gaps[0]} {one} {gaps[1]} {other} {gaps[2]} {name} {gaps[3]} to"
        for name in (again, answer)
    )
    return Variant(clean, corrupt, answer, again)
