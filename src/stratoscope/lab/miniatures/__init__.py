"""Small models trained on demand, deterministic by seed: one file for each.

    folder = lab.make("tiny-gpt")                  # minutes the first time, with a bar; then at
                                                   once
    lm = stratoscope.load(folder)
    lab.card("tiny-gpt")["results"]                # also what it was trained on, for how long, how
                                                   the loss fell

A file here that defines `VERSION` and `recipe(seed, say, *, settings...)` is a miniature:
`tiny_gpt.py` is "tiny-gpt". There is no list to edit. `engine/train.py` is the loop they share,
`_make.py` the folder they end in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if TYPE_CHECKING:
    from stratoscope.lab.miniatures._make import card as card
    from stratoscope.lab.miniatures._make import make as make
else:
    __getattr__, __dir__ = lazy(
        __name__, __path__, make=f"{__name__}._make", card=f"{__name__}._make"
    )


def names() -> list[str]:
    """Every miniature there is."""
    from stratoscope.lab import _subjects, miniatures

    return _subjects.names(miniatures)
