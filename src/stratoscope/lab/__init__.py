"""Corpora, tasks and miniature models with known answers, for claims and tests to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if TYPE_CHECKING:
    from stratoscope.lab.datasets import data as data
    from stratoscope.lab.miniatures import card as card
    from stratoscope.lab.miniatures import make as make
    from stratoscope.lab.nets import net as net
else:
    _miniatures = f"{__name__}.miniatures"
    _own = {
        "data": f"{__name__}.datasets",
        "net": f"{__name__}.nets",
        "make": _miniatures,
        "card": _miniatures,
    }
    __getattr__, __dir__ = lazy(__name__, __path__, **_own)
