"""Outlines: every shape and letter as polygons and strokes in a square from -1 to 1, y downwards.

A shape is a list of parts. A part is a line through points, closed or not, drawn with a round pen
as wide as `pen`; `filled` fills what it encloses. A round pen along a filled polygon rounds its
corners.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

Point = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One line or polygon, in units of the shape's radius."""

    points: tuple[Point, ...]
    pen: float
    closed: bool = True
    filled: bool = True

    @property
    def segments(self) -> list[tuple[Point, Point]]:
        """The straight pieces that the pen draws."""
        ends = (*self.points[1:], self.points[0]) if self.closed else self.points[1:]
        return list(zip(self.points, ends))


def turned(count: int, radius: float, start: float = -pi / 2) -> list[Point]:
    """`count` points around a circle, from the top."""
    return [
        (radius * cos(start + 2 * pi * i / count), radius * sin(start + 2 * pi * i / count))
        for i in range(count)
    ]


def _star() -> tuple[Point, ...]:
    tips, dents = turned(5, 0.96), turned(5, 0.44, -pi / 2 + pi / 5)
    return tuple((x, y + 0.05) for pair in zip(tips, dents) for x, y in pair)


def _heart() -> tuple[Point, ...]:
    turns = [2 * pi * i / 40 for i in range(40)]
    return tuple(
        (
            0.057 * 16 * sin(t) ** 3,
            -0.057 * (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) - 0.12,
        )
        for t in turns
    )


def _cross(arm: float, half: float) -> tuple[Point, ...]:
    corner = [(half, -arm), (half, -half), (arm, -half)]
    quarters = [
        lambda x, y: (x, y),
        lambda x, y: (-y, x),
        lambda x, y: (-x, -y),
        lambda x, y: (y, -x),
    ]
    return tuple(turn(x, y) for turn in quarters for x, y in corner)


def _lines(*lines: str) -> tuple[Part, ...]:
    """Strokes of a letter on a grid of 3 columns (a b c) and 3 rows (0 1 2): "a0 a2" is its left
    stem."""
    column, row = {"a": -0.52, "b": 0.0, "c": 0.52}, {"0": -0.74, "1": 0.0, "2": 0.74}
    place = lambda name: (column[name[0]], row[name[1]])  # noqa: E731
    return tuple(
        Part(tuple(map(place, line.split())), 0.42, closed=False, filled=False) for line in lines
    )


SHAPES: dict[str, tuple[Part, ...]] = {
    "circle": (Part(tuple(turned(48, 0.86)), 0.0),),
    "square": (Part(((-0.68, -0.68), (0.68, -0.68), (0.68, 0.68), (-0.68, 0.68)), 0.16),),
    "triangle": (Part(tuple((x, y + 0.16) for x, y in turned(3, 0.94)), 0.14),),
    "star": (Part(_star(), 0.06),),
    "heart": (Part(_heart(), 0.0),),
    "cross": (Part(_cross(0.78, 0.24), 0.12),),
    "diamond": (Part(((0.0, -0.92), (0.66, 0.0), (0.0, 0.92), (-0.66, 0.0)), 0.14),),
    "ring": (Part(tuple(turned(48, 0.66)), 0.4, filled=False),),
}
LETTERS: dict[str, tuple[Part, ...]] = {
    "A": (Part(((-0.62, 0.74), (0.0, -0.74), (0.62, 0.74)), 0.34, closed=False, filled=False),
          Part(((-0.4, 0.3), (0.4, 0.3)), 0.28, closed=False, filled=False)),
    "E": _lines("c0 a0 a2 c2", "a1 c1"),
    "H": _lines("a0 a2", "c0 c2", "a1 c1"),
    "K": _lines("a0 a2", "c0 a1 c2"),
    "L": _lines("a0 a2 c2"),
    "N": _lines("a2 a0 c2 c0"),
    "T": _lines("a0 c0", "b0 b2"),
    "V": _lines("a0 b2 c0"),
    "X": _lines("a0 c2", "c0 a2"),
    "Z": _lines("a0 c0 a2 c2"),
}  # fmt: skip
OUTLINES = SHAPES | {f"letter {name}": parts for name, parts in LETTERS.items()}
