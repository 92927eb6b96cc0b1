"""Painting: outlines to pixels, antialiased, on a soft ground."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, hypot

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

from stratoscope.lab.scenes.outlines import Part

FINE = 16  # each pixel is painted as 16 x 16 and averaged
GROUNDS = ((246, 241, 231), (238, 242, 246), (240, 244, 236), (247, 238, 236), (241, 238, 246))
Colour = tuple[int, int, int]


def cover(
    parts: Sequence[Part], x: float, y: float, radius: float, pixels: int
) -> Float[np.ndarray, "row column"]:
    """The share of each pixel that a shape covers. x, y, radius: shares of the picture's side."""
    left, top = (max(floor((c - radius * 1.1) * pixels), 0) for c in (x, y))
    right, bottom = (min(ceil((c + radius * 1.1) * pixels), pixels) for c in (x, y))
    canvas = Image.new("L", ((right - left) * FINE, (bottom - top) * FINE), 0)
    brush = ImageDraw.Draw(canvas)
    unit = radius * pixels * FINE

    def to(point: tuple[float, float]) -> tuple[float, float]:
        return (
            (x * pixels - left) * FINE + point[0] * unit,
            (y * pixels - top) * FINE + point[1] * unit,
        )

    for part in parts:
        if part.filled:
            _fill(brush, [to(point) for point in part.points])
        for start, end in part.segments if part.pen else ():
            _stroke(brush, to(start), to(end), part.pen * unit / 2)
    share = np.zeros((pixels, pixels), dtype=np.float32)
    share[top:bottom, left:right] = np.asarray(canvas.reduce(FINE), dtype=np.float32) / 255
    return share


def _stroke(
    brush: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], half: float
) -> None:
    """A straight line with round ends."""
    (a, b), (c, d) = start, end
    length = hypot(c - a, d - b) or 1.0
    u, v = -(d - b) / length * half, (c - a) / length * half
    _fill(brush, [(a + u, b + v), (c + u, d + v), (c - u, d - v), (a - u, b - v)])
    for e, f in (start, end):
        brush.ellipse(
            [round(side - 0.5) for side in (e - half, f - half, e + half, f + half)], fill=255
        )


def _fill(brush: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]]) -> None:
    """A polygon. Pillow cuts decimals off and puts whole numbers at the middle of pixels: rounding
    here keeps its place."""
    brush.polygon([(round(x - 0.5), round(y - 0.5)) for x, y in points], fill=255)


def paint(
    cover: Float[np.ndarray, "thing row column"],
    colours: Sequence[Colour],
    ground: Colour,
    strokes: Sequence[tuple[float, float, float, float]] = (),
) -> UInt8[np.ndarray, "row column rgb=3"]:
    """The picture: a ground lit from the upper left, pale strokes, soft shadows, then the
    things."""
    pixels = cover.shape[1]
    down, across = np.mgrid[0:pixels, 0:pixels] / pixels
    light = 1.015 - 0.05 * (down + across) / 2
    picture = np.array(ground, dtype=np.float32) * light[..., None]
    for line in strokes:
        picture *= 1 - 0.1 * _line(line, pixels)[..., None]
    picture *= 1 - 0.2 * _shadow(cover.max(axis=0), pixels)[..., None]
    # of the whole picture, so that a colour looks the same on every shape
    shade = 1.06 - 0.12 * down
    for share, colour in zip(cover, colours):
        tone = np.array(colour, dtype=np.float32) * shade[..., None]
        picture += (tone - picture) * share[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _line(line: tuple[float, float, float, float], pixels: int) -> Float[np.ndarray, "row column"]:
    canvas = Image.new("L", (pixels * 4, pixels * 4), 0)
    a, b, c, d = (value * pixels * 4 for value in line)
    _stroke(ImageDraw.Draw(canvas), (a, b), (c, d), pixels * 0.03)
    return np.asarray(canvas.reduce(4), dtype=np.float32) / 255


def _shadow(cover: Float[np.ndarray, "row column"], pixels: int) -> Float[np.ndarray, "row column"]:
    """Where light is missing: the things, a little lower, blurred."""
    drop = max(round(pixels * 0.018), 1)
    canvas = Image.fromarray((np.roll(cover, drop, axis=0) * 255).astype(np.uint8))
    return (
        np.asarray(canvas.filter(ImageFilter.GaussianBlur(pixels * 0.02)), dtype=np.float32) / 255
    )
