"""A local page on which a prompt is typed, seen, clicked at and changed: `stratoscope serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
