"""What kind of word a token is, and the rival of an answer: a likely token of the answer's kind.

A question "why A rather than B" is sharp when A and B could stand in the same place: a name against
a name, a number against a number. Against " the", nearly all that the model knows of A counts for
A. That heads stand out further from chance with such a foil held on the six prompts it was designed
on, not on 24 others (docs/foil.md): it makes the question plainer to read, no easier to answer.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import FamilyError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

# a rival is among so many of the most probable tokens, at most so many logits below the best,
LIKELY, FAR = 200, 10.0
NEAREST_OF = (
    10  # and of so many most probable ones of the kind it is the nearest in the unembedding
)

BYTES = re.compile(r"<[0-9A-F]{2}( [0-9A-F]{2})*>")  # as `token_text` writes what is no text alone

# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries, and
# the like. Other languages have no list here: there, shape and script alone make the kind.
FUNCTION_WORDS = frozenset(
    """a about above across after again against all along also although always am among an and
    another any anyone anything are around as at away back be because been before behind being below
    beside between beyond both but by can cannot could did do does doing done down during each
    either else ever every everyone everything few for from further had has have having he her here
    hers herself him himself his how however i if in inside into is it its itself just many may me
    might mine more most much must my myself near neither never no nobody none nor not nothing now
    of off often on once one only onto or other others ought our ours ourselves out over own per
    perhaps quite rather s same shall she should since so some someone something still such t than
    that the their theirs them themselves then there therefore these they this those though through
    thus till to together too toward towards under unless until up upon us very was we well were
    what whatever when whenever where wherever whether which while who whoever whole whom whose why
    will with within without would yes yet you your yours yourself""".split()
)


class Kind(NamedTuple):
    """How a token is written and whether it is a function word; two tokens are of one kind if
    equal."""

    opening: str  # "space", "##" (a piece of BERT's) or ""
    case: str  # "lower", "Capital", "UPPER", or "" for scripts that have none
    signs: str  # "letters", "digits", "blank", "bytes" (a part of a character) or "marks"
    script: str  # the first word of its letters' Unicode name: "LATIN", "ARABIC", "CJK", ...
    function: bool

    def __str__(self) -> str:
        return self.named()

    def named(self, *, pieces: bool = False) -> str:
        """For a sentence: what is said of both the answer and its rival.

        pieces: of a tokenizer that marks the pieces within a word (BERT's ##), where a token
        without a mark begins one.
        """
        if self.signs != "letters":
            return {
                "digits": "number",
                "blank": "piece of white space",
                "bytes": "part of a character",
                "marks": "token of signs",
            }[self.signs]
        word = "function word" if self.function else "word"
        case = {"Capital": "capitalised ", "UPPER": "upper-case ", "lower": ""}.get(self.case, "")
        script = "" if self.script == "LATIN" else f"{self.script.capitalize()} "
        inside = self.opening == "##" or (self.opening == "" and not pieces)
        return f"{case}{script}{word}" + (" without a space before it" if inside else "")


def kind(text: str) -> Kind:
    """The kind of one token's text."""
    opening = (
        "##" if text.startswith("##") else "space" if text[:1].isspace() and text.strip() else ""
    )
    bare = text.removeprefix("##").strip()
    if not bare:
        return Kind(opening, "", "blank", "", False)
    if BYTES.fullmatch(bare):
        return Kind(opening, "", "bytes", "", False)
    if bare.isdecimal():
        return Kind(opening, "", "digits", _script(bare), False)
    if not all(
        c.isalpha() or unicodedata.category(c)[0] == "M" or c in "'’-" for c in bare
    ) or not any(c.isalpha() for c in bare):
        return Kind(opening, "", "marks", "", False)
    letters = [c for c in bare if c.isalpha()]
    case = ""
    if any(c.isupper() or c.islower() for c in letters):
        case = (
            "UPPER"
            if all(c.isupper() for c in letters)
            else "Capital"
            if letters[0].isupper()
            else "lower"
        )
    return Kind(opening, case, "letters", _script(letters[0]), bare.lower() in FUNCTION_WORDS)


@dataclass(frozen=True)
class Rival:
    """The token to compare an answer with; `why` is one sentence, `weak` says that none of its kind
    was likely."""

    token: int
    why: str
    weak: bool


def unembedding(lm: LM) -> Float[Tensor, "vocab dim"]:
    """What tokens are near each other by."""
    try:
        return lm.weight("logits")
    except (SiteError, FamilyError):  # a read-out of several layers
        return lm.weight("embed")


def rivals(
    lm: LM,
    logits: Float[Tensor, " vocab"],
    answer: int,
    n: int = NEAREST_OF,
    unembed: Float[Tensor, "vocab dim"] | None = None,
) -> list[int]:
    """The n most probable tokens of the answer's kind, the nearest to it in the unembedding first.

    logits: at the answer's place. unembed: `unembedding`, where several answers are asked; to
    read it is to look through all of it. Only LIKELY tokens count, at most FAR below the best; []
    where none is of its kind, for classes, and without a tokenizer, which alone knows kinds.
    """
    if lm.readout.names:
        return []
    special = set(lm.tokenizer.all_special_ids) if lm.tokenizer is not None else {answer}
    if answer in special:
        return []
    text, top = token_text(lm.tokenizer, answer), logits.topk(min(LIKELY, len(logits)))
    likely = [
        t
        for t, x in zip(top.indices.tolist(), top.values.tolist())
        if x > float(top.values[0]) - FAR
    ]
    same = [
        t
        for t in likely
        if t != answer and t not in special and _other(token_text(lm.tokenizer, t), text)
    ][:n]
    unembed = unembedding(lm) if unembed is None else unembed
    cosine = torch.cosine_similarity(unembed[same].float(), unembed[answer][None].float(), dim=1)
    return [same[i] for i in cosine.argsort(descending=True).tolist()]


def rival(
    lm: LM,
    logits: Float[Tensor, " vocab"],
    answer: int,
    unembed: Float[Tensor, "vocab dim"] | None = None,
) -> Rival:
    """The best foil for an answer, given the logits at its place: the nearest of its `rivals`.

    Where there is none, the most probable other token, and `why` says that the question is weak.
    """
    first, second = logits.topk(2).indices.tolist()
    other = second if first == answer else first
    if lm.readout.names:
        return Rival(other, "The foil is the most probable other class.", False)
    if lm.tokenizer is None:
        return Rival(other, "The foil is the most probable other token.", False)
    text = token_text(lm.tokenizer, answer)
    wanted = kind(text).named(pieces=_marks_pieces(lm))
    candidates = rivals(lm, logits, answer, unembed=unembed)
    if not candidates:
        why = (
            f"No likely token is of the kind of {text!r} ({wanted}): the foil is the most probable "
            "other one, "
            f"{token_text(lm.tokenizer, other)!r}, and the question is weak. Give a foil that "
            "could stand in its place."
        )
        return Rival(other, why, True)
    why = (
        f"The foil {token_text(lm.tokenizer, candidates[0])!r} was chosen by itself: like the "
        f"answer a {wanted}, of the "
        f"{len(candidates)} most probable of these the nearest to it in the unembedding."
    )
    return Rival(candidates[0], why, False)


def _other(text: str, answer: str) -> bool:
    """Of the answer's kind, and not the same word inflected or cut short."""
    mine, yours = text.strip().lower(), answer.strip().lower()
    inflected = (
        len(mine) > 2 and len(yours) > 2 and (mine.startswith(yours) or yours.startswith(mine))
    )
    return kind(text) == kind(answer) and not inflected


def _marks_pieces(lm: LM) -> bool:
    model = getattr(getattr(lm.tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ == "WordPiece"


def _script(text: str) -> str:
    return unicodedata.name(text[0], "UNKNOWN").split()[0]
