"""Models of our own, on shelves by what a token is; each is an ordinary Hugging Face model with its
`FAMILY` on the class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
