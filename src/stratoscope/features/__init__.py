"""Methods about features: the entries of a sparse dictionary of what stands at a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

AXES = {"feature": "an entry of a sparse dictionary, or a unit or direction asked in its place"}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
