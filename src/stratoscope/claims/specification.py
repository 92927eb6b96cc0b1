"""A specification, read for one paper: its entry, what that says of the method and what of claims,
the files it names, and what it expects.

A specification is a page for those who build. Entries stand under `### key (2024)` or `**key**
(7)`, in bullets whose first word says what they are about (`Mechanism`, `M:`, `Small claim`, `S:`).
"""

from __future__ import annotations

import re

from stratoscope.claims import expression
from stratoscope.errors import ClaimError

_ROOMS = (
    "tokens|embeddings|neurons|features|heads|layers|circuits|editing|retrieval|vision"
    "|architectures|training|benchmarks"
)
# of architectures/
_SHELVES = "recommend|graphs|molecules|series|codecs|control|rows|bytes|generate|memory"
# `neurons/core.py`, or `tokens/byte_probabilities.measure(...)`
_FILE = re.compile(
    rf"`((?:{_ROOMS}|{_SHELVES})(?:/\w+)*)/(\w+)\.(?:py|measure|fit|edit|build|items)\b"
)
# bullets about claims: the others are about the method
_CLAIMS = re.compile(r"- (?:\*\*)?(?:Identity|Small|Nulls?\b|If it|Not\b|n\b|[CSNI!][:.])")
_IDENTITY = re.compile(r"- (?:\*\*)?(?:Identity|I[:.])")
# what the ledger and specifications call a model that is really there, and not trained here
_REAL = re.compile(r"smollm2|gemma3|qwen2|any.?LM", re.IGNORECASE)


def entry(text: str, key: str) -> str:
    """The entry of a paper. Raises ClaimError, with the entries there are, when there is none."""
    headings = [*re.finditer(r"^(?:### ([\w-]+)\b.*|\*\*([\w-]+)\*\* \(.*)$", text, re.MULTILINE)]
    ends = [*(match.start() for match in headings[1:]), len(text)]
    for match, end in zip(headings, ends):
        if key in (match[1], match[2]):
            body = re.split(
                r"^(?:---|#{1,3} )", text[match.end() : end], maxsplit=1, flags=re.MULTILINE
            )[0]
            return body.strip()
    known = ", ".join(match[1] or match[2] for match in headings)
    raise ClaimError(f"That specification has no entry {key!r}; it has {known or 'none at all'}.")


def places(text: str) -> list[tuple[str, str]]:
    """Room and name of every method that an entry names, first to last."""
    found = [(match[1], match[2]) for match in _FILE.finditer(text)]
    shelves = _SHELVES.split("|")
    return list(
        dict.fromkeys(
            (f"architectures/{room}" if room.partition("/")[0] in shelves else room, name)
            for room, name in found
        )
    )


def bullets(text: str) -> list[str]:
    """The bullets of an entry, each with the lines that belong to it."""
    return [part.strip() for part in re.split(r"^(?=- )", text, flags=re.MULTILINE) if part.strip()]


def of_method(text: str) -> str:
    """The bullets of an entry that are about the method."""
    return "\n".join(part for part in bullets(text) if not _CLAIMS.match(part))


def of_claims(text: str) -> str:
    """The bullets of an entry that are about claims, nulls and traps."""
    return "\n".join(part for part in bullets(text) if _CLAIMS.match(part))


def identity(text: str) -> str:
    """The bullets of an entry about its identity claim."""
    return "\n".join(part for part in bullets(text) if _IDENTITY.match(part))


def small(text: str) -> str:
    """The bullets of an entry that are not about its identity claim."""
    return "\n".join(part for part in bullets(text) if not _IDENTITY.match(part))


def name(text: str) -> str:
    """What an entry calls its first small claim, or ""."""
    match = re.search(r"^- \*\*Small claim `(\w+)`", text, re.MULTILINE)
    return match[1] if match else ""


def on_a_real_model(text: str) -> bool:
    """Whether a text names one of the language models that are really there."""
    return bool(_REAL.search(text))


def expected(text: str, word: str = "expect") -> str:
    """The first expectation (or `direction`) of a text that can be judged, or ""."""
    for expression_text in re.findall(rf"`?{word}`?:?\s*`?([^`]+?)(?:`|\.\s|\.$|;\s)", text):
        try:
            expression.names(expression_text)
        except ClaimError:
            continue
        return " ".join(expression_text.split())
    return ""
