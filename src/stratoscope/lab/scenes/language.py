"""What can be said and asked of a scene: a caption, and questions with exactly one right answer.

A thing is named by the fewest words that tell it from the others ("the square", else "the red
thing", else "the red square", else "the small red square"); one that no words tell is not spoken
of. A question never gives its answer away: the colour is asked of a thing named without its colour.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stratoscope.errors import InputError
from stratoscope.lab.scenes.outlines import LETTERS, SHAPES
from stratoscope.lab.scenes.scene import COLOURS, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")
CLEARLY = (
    0.1  # least difference of two centres along an axis, as a share of the side, that is spoken of
)


class Question(NamedTuple):
    """kind: a key of KINDS. things: which things of the scene it speaks of, as indices."""

    kind: str
    text: str
    answer: str
    things: tuple[int, ...]


def caption(scene: Scene) -> str:
    """Every thing with size, colour and shape, then how the first two that can be named stand to
    each other."""
    names = [f"a {thing.size} {thing.name}" for thing in scene.things]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if not (pairs := _pairs(scene)):
        return listed
    first, second = pairs[0]
    relation = max(
        RELATIONS, key=lambda word: _lead(scene.things[first], word, scene.things[second])
    )
    return f"{listed} ; the {_name(scene, first)} is {relation} the {_name(scene, second)}"


def questions(
    scene: Scene,
    n: int = 4,
    *,
    kinds: Sequence[str] = ("colour", "shape", "count", "relation"),
    seed: int | str = 0,
) -> list[Question]:
    """n different questions, the kinds in turn from a random one; fewer when the scene has no more
    to ask about.

    Of the questions answered by yes or no, half of each kind are yes. Raises InputError for an
    unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"no kind of question {unknown}; there are {', '.join(KINDS)}.")
    generator = random.Random(f"questions {seed} {scene.things}")
    turn, questions = generator.randrange(len(kinds)), {}
    for attempt in range(4 * n + 4 * len(kinds)):
        if len(questions) == n:
            break
        question = KINDS[kinds[(turn + attempt) % len(kinds)]](scene, generator)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def stands(first: Thing, relation: str, second: Thing) -> bool:
    """Whether the first thing clearly stands so to the second."""
    return _lead(first, relation, second) >= CLEARLY


def _lead(first: Thing, relation: str, second: Thing) -> float:
    """How far the first centre is ahead of the second in that direction."""
    across, down = second.x - first.x, second.y - first.y
    return {"left of": across, "right of": -across, "above": down, "below": -down}[relation]


# --- the kinds: each draws one question, or None when the scene has none --------------------------


def _colour(scene: Scene, generator: random.Random) -> Question | None:
    things = [
        i
        for i in range(len(scene.things))
        if _alone(scene, i, "shape") or _alone(scene, i, "size", "shape")
    ]
    if not things:
        return None
    one = generator.choice(things)
    thing = scene.things[one]
    name = thing.shape if _alone(scene, one, "shape") else f"{thing.size} {thing.shape}"
    return Question("colour", f"what colour is the {name} ?", thing.colour, (one,))


def _shape(scene: Scene, generator: random.Random) -> Question | None:
    things = [
        i
        for i, thing in enumerate(scene.things)
        if thing.shape in SHAPES
        and (_alone(scene, i, "colour") or _alone(scene, i, "size", "colour"))
    ]
    if not things:
        return None
    one = generator.choice(things)
    thing = scene.things[one]
    name = thing.colour if _alone(scene, one, "colour") else f"{thing.size} {thing.colour}"
    return Question("shape", f"what shape is the {name} thing ?", thing.shape, (one,))


def _letter(scene: Scene, generator: random.Random) -> Question | None:
    letters = [i for i, thing in enumerate(scene.things) if thing.shape not in SHAPES]
    alone = [
        i
        for i in letters
        if sum(scene.things[j].colour == scene.things[i].colour for j in letters) == 1
    ]
    if not alone:
        return None
    one = generator.choice(alone)
    thing = scene.things[one]
    return Question(
        "letter", f"which letter is {thing.colour} ?", thing.shape.removeprefix("letter "), (one,)
    )


def _size(scene: Scene, generator: random.Random) -> Question | None:
    things = [
        i
        for i in range(len(scene.things))
        if _name(scene, i) and not _name(scene, i).startswith(_SIZES)
    ]
    if not things:
        return None
    one = generator.choice(things)
    return Question(
        "size", f"what size is the {_name(scene, one)} ?", scene.things[one].size, (one,)
    )


def _count(scene: Scene, generator: random.Random) -> Question:
    """How many things of a colour, of a shape, or in all; the number is drawn first, so that none
    is rare."""
    groups = {"things": tuple(range(len(scene.things)))}
    for word in COLOURS:
        groups[f"{word} things"] = tuple(
            i for i, thing in enumerate(scene.things) if thing.colour == word
        )
    for word in SHAPES:
        plural = f"{word}es" if word == "cross" else f"{word}s"
        groups[plural] = tuple(i for i, thing in enumerate(scene.things) if thing.shape == word)
    number = generator.choice(sorted({len(things) for things in groups.values()}))
    name, things = generator.choice(
        [(name, things) for name, things in groups.items() if len(things) == number]
    )
    return Question("count", f"how many {name} are there ?", NUMBERS[number], things)


def _relation(scene: Scene, generator: random.Random) -> Question | None:
    """Is one thing left of (right of, above, below) another? Both ways round are asked only of what
    is clearly so."""
    yes = generator.random() < 0.5
    relations = [
        (a, b, relation)
        for a, b in _pairs(scene)
        for relation in RELATIONS
        if stands(
            *(
                (scene.things[a], relation, scene.things[b])
                if yes
                else (scene.things[b], relation, scene.things[a])
            )
        )
    ]
    if not relations:
        return None
    first, second, relation = generator.choice(relations)
    text = f"is the {_name(scene, first)} {relation} the {_name(scene, second)} ?"
    return Question("relation", text, "yes" if yes else "no", (first, second))


def _presence(scene: Scene, generator: random.Random) -> Question:
    """Is there a red square? As many looks that are not there as are: first those whose colour and
    shape both are."""
    here = sorted({(thing.colour, thing.shape) for thing in scene.things})
    mixed = [(c, s) for c, _ in here for _, s in here if (c, s) not in here]
    others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in here + mixed]
    still = random.Random(f"absent {scene.things}")  # the same for every question about this scene
    absent = [*still.sample(mixed, len(mixed)), *still.sample(others, len(others))][: len(here)]
    yes = generator.random() < 0.5
    look = generator.choice(here if yes else absent)
    things = tuple(i for i, thing in enumerate(scene.things) if (thing.colour, thing.shape) == look)
    return Question("presence", f"is there a {' '.join(look)} ?", "yes" if yes else "no", things)


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "presence": _presence,
    "size": _size,
    "letter": _letter,
}
_SIZES = ("small", "large")
_LITTLE = (
    "a ; , and is are the there thing things how many what which colour shape size letter ? "
    "left right of above below"
)
_PLURALS = [f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES]
# every word that a caption, a question or an answer can hold
WORDS = (*_LITTLE.split(), *_SIZES, "yes", "no", *NUMBERS, *COLOURS, *SHAPES, *_PLURALS, *LETTERS)


# --- names ----------------------------------------------------------------------------------------


def _alone(scene: Scene, index: int, *words: str) -> bool:
    """Whether no other thing shares all of these attributes."""
    own = scene.things[index]
    return sum(all(getattr(t, w) == getattr(own, w) for w in words) for t in scene.things) == 1


def _name(scene: Scene, index: int) -> str:
    """The fewest words that tell this thing from the others; "" when none do."""
    thing = scene.things[index]
    for words in (("shape",), ("colour",), ("colour", "shape"), ("size", "colour", "shape")):
        if _alone(scene, index, *words):
            return " ".join(getattr(thing, word) for word in words) + (
                " thing" if words == ("colour",) else ""
            )
    return ""


def _pairs(scene: Scene) -> list[tuple[int, int]]:
    """Every ordered pair of things that can be named."""
    named = [i for i in range(len(scene.things)) if _name(scene, i)]
    return [(a, b) for a in named for b in named if a != b]
