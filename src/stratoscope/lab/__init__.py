"""Corpora, tasks and miniature models with known answers, for claims and tests to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
