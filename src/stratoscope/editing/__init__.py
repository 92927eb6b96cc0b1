"""Methods that change what a model does, by weights or by sites, and give an edit that can be
undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
