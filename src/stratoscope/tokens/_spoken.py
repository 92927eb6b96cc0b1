"""How numbers, tokens and methods are said in a paragraph."""

from __future__ import annotations

import json

import numpy as np


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
