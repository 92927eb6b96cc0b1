"""Labelled arrays: one vocabulary of axis words, provenance on each result, one file per result; no
torch."""

from __future__ import annotations

from stratoscope.results.axes import AXES
from stratoscope.results.label import dataset, label
from stratoscope.results.store import load, save
from stratoscope.results.summary import summary

__all__ = ["AXES", "dataset", "label", "load", "save", "summary"]
