"""Tokens and numbers as a reader must see them: white space made visible, nothing that a browser
would act on.

Plotly renders a small HTML in labels and hover boxes (`<b>`, `<a href>`, `<br>`, entities), so
every string from a model or a user goes through `plain` before it enters a figure.
"""

from __future__ import annotations

import math
import unicodedata

_SHOWN = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def visible(token: str) -> str:
    """The token with its white space and its invisible characters written out, never empty."""
    return "".join(_SHOWN.get(c) or (_code(c) if _hidden(c) else c) for c in token) or "∅"


def readable(text: str) -> str:
    """A whole text for a page: spaces and line ends kept, those that hide or reorder others written
    out."""
    return "".join(c if c in " \n" or not _hidden(c) else _SHOWN.get(c) or _code(c) for c in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the last of them an ellipsis when some were cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


def plain(text: str) -> str:
    """The text with `&`, `<` and `>` as entities, so that plotly writes it and does not obey it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float, digits: int = 2, *, sign: bool = True) -> str:
    """A number for prose: a true minus sign, a plus where the direction matters, a dash where there
    is no number.
    """
    if not math.isfinite(value):
        return "–"
    value = round(value, digits) or 0.0  # no "−0.00"
    return f"{value:{'+' if sign and value else ''}.{digits}f}".replace("-", "−")


def scientific(value: float) -> str:
    """An error or another number whose size is what matters: 2.1 × 10⁻⁶; 0 and 0.1 to 1000 as they
    are."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 0.1 <= abs(value) < 1000:
        return f"{value:.3g}".replace("-", "−")
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")


def percent(probability: float) -> str:
    """A probability as a percentage with the digits that matter: 43%, 4.3%, 0.02%, <0.01%."""
    if not math.isfinite(probability):
        return "–"
    share = 100 * probability
    if 0 < share < 0.01:
        return "<0.01%"
    return f"{share:.0f}%" if share >= 10 else f"{share:.1f}%" if share >= 1 else f"{share:.2f}%"


def _hidden(character: str) -> bool:
    # C*: control, format (overrides of direction, zero width), surrogate, unassigned. Z*: other
    # spaces.
    return unicodedata.category(character)[0] in "CZ"


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
