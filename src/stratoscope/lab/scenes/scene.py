"""A scene: which things are in a picture, where, how large and in what colour; drawn from a seed
and an index."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from stratoscope.errors import InputError
from stratoscope.lab.scenes import painting
from stratoscope.lab.scenes.outlines import LETTERS, OUTLINES, SHAPES

COLOURS = {
    "red": (217, 58, 58),
    "orange": (243, 139, 44),
    "yellow": (247, 203, 62),
    "green": (70, 163, 96),
    "blue": (55, 116, 204),
    "purple": (133, 84, 178),
    "pink": (241, 148, 184),
    "black": (52, 56, 66),
}
RADIUS = {"small": (0.1, 0.115), "large": (0.165, 0.185)}  # of the picture's side
# least distance between two things, and from the edge, as shares of the side
GAP, EDGE = 0.025, 0.03
MOST = 6


class Thing(NamedTuple):
    """One thing: its shape ("square", or "letter A"), colour, size, centre and radius as shares of
    the picture's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in one picture of `pixels` by `pixels`, and the picture itself.

    strokes: pale lines that nothing is ever asked about, each (x, y, x, y). ground: the tint behind
    everything.
    """

    things: tuple[Thing, ...]
    pixels: int
    strokes: tuple[tuple[float, float, float, float], ...] = ()
    ground: tuple[int, int, int] = (244, 240, 232)

    @cached_property
    def masks(self) -> Bool[np.ndarray, "thing row column"]:
        """Where each thing is: the pixels that it covers at least half of."""
        return self._cover >= 0.5

    @cached_property
    def boxes(self) -> Int[np.ndarray, "thing side=4"]:
        """Left, top, right, bottom of each mask in pixels; right and bottom are the first
        outside."""
        boxes = []
        for mask in self.masks:
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return np.array(boxes, dtype=np.int64)

    @cached_property
    def picture(self) -> UInt8[np.ndarray, "row column rgb=3"]:
        colours = [COLOURS[thing.colour] for thing in self.things]
        return painting.paint(self._cover, colours, self.ground, self.strokes)

    @cached_property
    def _cover(self) -> np.ndarray:
        """The share of each pixel that each thing covers."""
        return np.stack(
            [
                painting.cover(OUTLINES[t.shape], t.x, t.y, t.radius, self.pixels)
                for t in self.things
            ]
        )


def scene(
    index: int,
    *,
    seed: int | str = 0,
    pixels: int = 64,
    things: tuple[int, int] = (2, 4),
    letters: float = 0.0,
    strokes: int = 0,
    shapes: Sequence[str] = tuple(SHAPES),
    colours: Sequence[str] = tuple(COLOURS),
) -> Scene:
    """The scene of that index: the same for the same arguments, on every machine.

    things: fewest and most. letters: the chance of each thing to be a letter. strokes: pale lines
    behind the things that are there to distract. Raises InputError for fewer than 1 or more than 6
    things, fewer than 32 pixels, or words that are no shape or colour.
    """
    low, high = things
    if not 1 <= low <= high <= MOST or pixels < 32:
        raise InputError(
            f"things={things}, pixels={pixels}: ask for 1 to {MOST} things in 32 pixels or more."
        )
    for what, chosen, known in (("shapes", shapes, SHAPES), ("colours", colours, COLOURS)):
        if not chosen or not set(chosen) <= known.keys():
            raise InputError(f"{what}={chosen}: choose one or more of {', '.join(known)}.")
    generator = random.Random(f"scene {seed} {index}")
    count = generator.randint(low, high)
    looks = [_look(generator, letters, shapes, colours) for _ in range(count)]
    places = _places(generator, [generator.choice(list(RADIUS)) for _ in range(count)])
    lines = tuple(_line(generator) for _ in range(strokes))
    made = tuple(Thing(*look, *place) for look, place in zip(looks, places))
    return Scene(made, pixels, lines, generator.choice(painting.GROUNDS))


def _look(
    generator: random.Random, letters: float, shapes: Sequence[str], colours: Sequence[str]
) -> tuple[str, str]:
    letter = generator.random() < letters
    shape = (
        f"letter {generator.choice(list(LETTERS))}" if letter else generator.choice(list(shapes))
    )
    return shape, generator.choice(list(colours))


def _places(generator: random.Random, sizes: list[str]) -> list[tuple[str, float, float, float]]:
    """Size, centre and radius of each thing, none touching another; sizes are shuffled or made
    small if they do not fit."""
    for attempt in range(200):
        if attempt % 20 == 19 and "large" in sizes:
            sizes[sizes.index("large")] = "small"
        places: list[tuple[str, float, float, float]] = []
        for size in sizes:
            for _ in range(30):
                radius = generator.uniform(*RADIUS[size])
                x, y = (generator.uniform(radius + EDGE, 1 - radius - EDGE) for _ in range(2))
                if all(
                    (x - a) ** 2 + (y - b) ** 2 > (radius + r + GAP) ** 2 for _, a, b, r in places
                ):
                    places.append((size, x, y, radius))
                    break
        if len(places) == len(sizes):
            return places
    raise InputError(f"{len(sizes)} things do not fit; ask for fewer.")


def _line(generator: random.Random) -> tuple[float, float, float, float]:
    x, y = generator.random(), generator.random()
    return x, y, x + generator.uniform(-0.5, 0.5), y + generator.uniform(-0.5, 0.5)
