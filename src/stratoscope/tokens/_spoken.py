"""How numbers, tokens and methods are said in a paragraph, and read back from it."""

from __future__ import annotations

import json
import re

import numpy as np
from jaxtyping import Float

from stratoscope.errors import InputError

QUOTE = r'("(?:[^"\\]|\\.)*")'
CITATION = re.compile(QUOTE + r" \(position (\d+), (\d+)%, towards the (answer|foil)\)")


def read_back(text: str, length: int) -> Float[np.ndarray, " position"]:
    """The map of so many positions as far as a paragraph tells it: each cited share, below 0 where
    it is towards the foil, and 0 elsewhere. Raises InputError for a position that is not there."""
    out = np.zeros(length)
    for _, position, part, towards in CITATION.findall(text):
        if int(position) >= length:
            raise InputError(f"the text cites position {position} of {length}: is it of this map?")
        out[int(position)] = int(part) / 100 * (1 if towards == "answer" else -1)
    return out


def opinion(method: str, agreeing: int, cited: int) -> str:
    verdict = (
        "the two agree on most"
        if 2 * agreeing > cited
        else "the two disagree, so trust this ranking less"
    )
    shared = f"{agreeing} of these {cited} among its own, with the same sign"
    name = spoken(method)
    return f" {name[:1].upper()}{name[1:]} has {shared}: {verdict}." if cited else ""


def quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def percent(share: float | np.floating) -> str:
    return f"{100 * float(share):.0f}%"


def chance(probability: float) -> str:
    """Two decimals, or the first digit that is not 0: 0.62, 0.00002."""
    return (
        f"{probability:.2f}"
        if probability >= 0.01
        else np.format_float_positional(probability, 1, fractional=False)
    )


def side(attribution: float | np.floating) -> str:
    return "answer" if attribution > 0 else "foil"


def spoken(method: str) -> str:
    name = method.removeprefix("tokens.").replace("_", " ")
    return {"shapley": "the Shapley value", "": "the given saliency"}.get(name, name)
