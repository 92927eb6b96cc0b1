"""Captioned pictures of coloured shapes, with masks, boxes, and questions that have exactly one
right answer.

    one = scenes.scene(7, seed=0, pixels=64)       # the same on every machine
    one.picture, one.masks, one.boxes              # (row, column, rgb), (thing, row, column),
                                                   (thing, side)
    scenes.caption(one)                            # a large red square and a small blue ring ; the
                                                   square is ...
    scenes.questions(one, 4)                       # what colour is the square ?  red

`outlines` says what the shapes look like, `scene` draws who stands where, `painting` turns it into
pixels, `language` into words. Things never touch; sizes are far apart; only clear differences of
place are spoken of.
"""

from __future__ import annotations

from stratoscope.lab.scenes.language import KINDS, WORDS, Question, caption, questions, stands
from stratoscope.lab.scenes.outlines import LETTERS, SHAPES
from stratoscope.lab.scenes.scene import COLOURS, Scene, Thing, scene

__all__ = [
    "COLOURS",
    "KINDS",
    "LETTERS",
    "SHAPES",
    "WORDS",
    "Question",
    "Scene",
    "Thing",
    "caption",
    "questions",
    "scene",
    "stands",
]
