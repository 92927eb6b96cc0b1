"""Tokens and numbers as a reader must see them: white space made visible, nothing that a browser
would act on.

Plotly renders a small HTML in labels and hover boxes (`<b>`, `<a href>`, `<br>`, entities), so
every string from a model or a user goes through `plain` before it enters a figure.
"""

from __future__ import annotations

import math
import re
import unicodedata
from html import escape

_SHOWN = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
_JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji are spelt with them
_FSI, _PDI = "\u2068", "\u2069"  # what stands between is laid out by itself, in its own direction
_BYTES = re.compile(r"<[0-9A-F]{2}(?: [0-9A-F]{2})*>")
# the forms that tokenizers give to tokens which no text spells
SPECIAL = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:s|pad|unk|bos|eos|mask|sep|cls)>|<(?:start|end)_of_turn>"
    r"|\[(?:CLS|SEP|MASK|PAD|UNK)\]|" + _BYTES.pattern
)
JOINED = "←"  # as `models.text` writes it: the left neighbour shows what this token holds
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def visible(token: str) -> str:
    """The token with its white space and its invisible characters written out, never empty."""
    if _BYTES.fullmatch(token):
        return token
    token = based(token)
    return "".join(_SHOWN.get(c) or (_code(c) if _hidden(c) else c) for c in token) or "∅"


def readable(text: str) -> str:
    """A whole text for a page: spaces and line ends kept, those that hide or reorder others written
    out, and a mark that combines given what to combine with."""
    pairs = zip(based(text), " " + based(text))
    return "".join(c if _kept(c, left) else _SHOWN.get(c) or _code(c) for c, left in pairs)


def based(text: str) -> str:
    """A combining mark that nothing stands before (a token may begin with one) on a dotted circle:
    else it is drawn over a quotation mark or a neighbour's last letter."""
    return "".join(
        f"◌{c}" if unicodedata.category(c)[0] == "M" and _bare(left) else c
        for c, left in zip(text, " " + text)
    )


def runs(text: str) -> list[tuple[str, bool]]:
    """The text in pieces, and which of them are written from right to left.

    A number that follows Arabic or Hebrew would else be moved to its other side, with all brackets
    and signs between.
    """
    kinds = "".join(
        "r" if _right(c) else "m" if unicodedata.category(c)[0] == "M" else "s" if c == " " else "-"
        for c in text
    )
    pieces, at = [], 0
    for match in re.finditer("r[rm]*(?:s+r[rm]*)*", kinds):
        begin, end = match.span()
        pieces += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]


def isolated(text: str) -> str:
    """A text with anything right-to-left in it as one that its surroundings do not reorder, by
    Unicode's own marks: for figures and terminals, which know no HTML."""
    return f"{_FSI}{text}{_PDI}" if leftward(text) else text


def prose(text: str) -> str:
    """A sentence as HTML: `readable`, escaped, each right-to-left run in a `<bdi>` of its own."""
    return "".join(
        f"<bdi>{escape(piece)}</bdi>" if right else escape(piece)
        for piece, right in runs(readable(text))
    )


def quiet(text: str) -> str:
    """A whole prompt as HTML: special tokens and line ends are there, and stand back."""
    parts, at = [], 0
    for match in SPECIAL.finditer(text):
        parts += [_lined(text[at : match.start()]), _faint(match[0])]
        at = match.end()
    return "".join([*parts, _lined(text[at:])])


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the last of them an ellipsis when some were cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


def plain(text: str) -> str:
    """The text with `&`, `<` and `>` as entities, so that plotly writes it and does not obey it;
    right-to-left text isolated."""
    return isolated(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


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


def leftward(text: str) -> bool:
    """Whether any of it is written from right to left."""
    return any(map(_right, text))


def _lined(text: str) -> str:
    return escape(readable(text)).replace("\n", f"{_faint('↵')}\n")


def _faint(text: str) -> str:
    return f'<span class="special">{escape(text)}</span>'


def _right(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL", "AN")


def _bare(left: str) -> bool:
    return unicodedata.category(left)[0] in "ZPC" and left not in _JOINERS


def _kept(character: str, left: str) -> bool:
    if character in _JOINERS:
        return left > "\u00ff" and not _hidden(left)
    return character in " \n" or not _hidden(character)


def _hidden(character: str) -> bool:
    # C*: control, format (overrides of direction, zero width), surrogate, unassigned. Z*: other
    # spaces.
    return unicodedata.category(character)[0] in "CZ"


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
