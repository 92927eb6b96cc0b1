"""What the tests of circuits share: planted models, wrapped, and their options."""

from __future__ import annotations

from functools import cache
from typing import Any

import xarray as xr

from stratoscope.lab import planted as room
from stratoscope.lab.planted import Planted
from stratoscope.models import LM, wrap

CLEAN = [[3, 14, 15, 9, 65, 35, 8], [38, 46, 26, 43]]
CORRUPT = [[3, 14, 77, 9, 65, 30, 8], [38, 11, 26, 43]]
ASKED: dict[str, Any] = {"answer": 5, "foil": 9}


@cache
def everything(seed: int = 0) -> dict[str, Planted]:
    return {one.name: one for one in room.everything(seed)}


NAMES = tuple(everything())


@cache
def lm_of(name: str, seed: int = 0) -> LM:
    one = everything(seed)[name]
    return wrap(one.model, one.tokenizer)


def options(one: Planted) -> dict[str, Any]:
    return {"corrupt": one.corrupt, "answer": one.answer, "foil": one.foil}


def pairs(found: xr.Dataset) -> list[tuple[str, str]]:
    return list(zip(found.sender.values.tolist(), found.receiver.values.tolist()))


def truth(one: Planted) -> frozenset[tuple[str, str]]:
    return one.edges | one.opposing_edges
