"""What kind of word a token is, and the rival of an answer: a likely token of the answer's kind.

A question "why A rather than B" is sharp when A and B could stand in the same place: a name against
a name, a number against a number. Against " the", nearly all that the model knows of A counts for A,
and no head stands out from chance.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import FamilyError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

LIKELY, FAR = 200, 10.0  # a rival is among so many of the most probable tokens, at most so many logits below the best,
NEAREST_OF = 10  # and of so many most probable ones of the kind it is the nearest in the unembedding

# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries, and the
# like. Other languages have no list here: there, shape and script alone make the kind.
FUNCTION_WORDS = frozenset(
    """a about above across after again against all along also although always am among an and another
    any anyone anything are around as at away back be because been before behind being below beside
    between beyond both but by can cannot could did do does doing done down during each either else
    ever every everyone everything few for from further had has have having he her here hers herself
    him himself his how however i if in inside into is it its itself just many may me might mine more
    most much must my myself near neither never no nobody none nor not nothing now of off often on
    once one only onto or other others ought our ours ourselves out over own per perhaps quite rather
    s same shall she should since so some someone something still such t than that the their theirs
    them themselves then there therefore these they this those though through thus till to together
    too toward towards under unless until up upon us very was we well were what whatever when whenever
    where wherever whether which while who whoever whole whom whose why will with within without would
    yes yet you your yours yourself""".split()
)


class Kind(NamedTuple):
    """How a token is written and whether it is a function word; two tokens are of one kind if equal."""

    opening: str  # "space", "##" (a piece of BERT's) or ""
    case: str  # "lower", "Capital", "UPPER", or "" for scripts that have none
    signs: str  # "letters", "digits", "blank" or "marks"
    script: str  # the first word of its letters' Unicode name: "LATIN", "ARABIC", "CJK", ...
    function: bool

    def __str__(self) -> str:
        """For a sentence: what is said of both the answer and its rival."""
        if self.signs != "letters":
            return {"digits": "number", "blank": "white space", "marks": "punctuation mark"}[self.signs]
        word = "function word" if self.function else "word"
        case = {"Capital": "capitalised ", "UPPER": "upper-case ", "lower": ""}.get(self.case, "")
        script = "" if self.script == "LATIN" else f"{self.script.capitalize()} "
        return f"{case}{script}{word}" + ("" if self.opening != "" else " without a space before it")


def kind(text: str) -> Kind:
    """The kind of one token's text."""
    opening = "##" if text.startswith("##") else "space" if text[:1].isspace() and text.strip() else ""
    bare = text.removeprefix("##").strip()
    if not bare:
        return Kind(opening, "", "blank", "", False)
    if bare.isdecimal():
        return Kind(opening, "", "digits", _script(bare), False)
    if not all(c.isalpha() or unicodedata.category(c)[0] == "M" or c in "'’-" for c in bare) or not any(
        c.isalpha() for c in bare
    ):
        return Kind(opening, "", "marks", "", False)
    letters = [c for c in bare if c.isalpha()]
    case = ""
    if any(c.isupper() or c.islower() for c in letters):
        case = "UPPER" if all(c.isupper() for c in letters) else "Capital" if letters[0].isupper() else "lower"
    return Kind(opening, case, "letters", _script(letters[0]), bare.lower() in FUNCTION_WORDS)


@dataclass(frozen=True)
class Rival:
    """The token to compare an answer with; `why` is one sentence, `weak` says that none of its kind was likely."""

    token: int
    why: str
    weak: bool


def rival(lm: LM, logits: Float[Tensor, " vocab"], answer: int) -> Rival:
    """The best foil for an answer, given the logits at its place.

    Of the LIKELY most probable tokens those of the answer's kind; of the NEAREST_OF most probable of
    these the nearest to the answer in the unembedding. Without one (or without a tokenizer, which
    alone knows kinds) the most probable other token, and `why` says that the question is weak.
    """
    order = [t for t in logits.topk(min(LIKELY, len(logits))).indices.tolist() if t != answer]
    if lm.readout.names:
        return Rival(order[0], "The foil is the most probable other class.", False)
    if lm.tokenizer is None:
        return Rival(order[0], "The foil is the most probable other token.", False)
    likely = [t for t in order if logits[t] > logits.max() - FAR]
    special = set(lm.tokenizer.all_special_ids)
    text = token_text(lm.tokenizer, answer)
    wanted = kind(text)
    same = [t for t in likely if t not in special and _other(kind, token_text(lm.tokenizer, t), text)]
    if answer in special or not same:
        other = token_text(lm.tokenizer, order[0])
        why = (
            f"No likely token is of the kind of {text!r} ({wanted}): the foil is the most probable other "
            f"one, {other!r}, and the question is weak. Give a foil that could stand in the answer's place."
        )
        return Rival(order[0], why, True)
    near = same[:NEAREST_OF]
    try:
        unembed = lm.weight("logits")
    except (SiteError, FamilyError):  # a read-out of several layers
        unembed = lm.weight("embed")
    cosine = torch.cosine_similarity(unembed[near].float(), unembed[answer][None].float(), dim=1)
    best = near[int(cosine.argmax())]
    rank = order.index(best) + 1
    why = (
        f"The foil {token_text(lm.tokenizer, best)!r} was chosen by itself: like the answer a {wanted}, "
        f"of the {len(near)} most probable of these the nearest to it in the unembedding "
        f"(place {rank} of all other tokens)."
    )
    return Rival(best, why, False)


def _other(kind_of: object, text: str, answer: str) -> bool:
    """Of the answer's kind, and not the same word inflected or cut short."""
    mine, yours = text.strip().lower(), answer.strip().lower()
    inflected = len(mine) > 2 and len(yours) > 2 and (mine.startswith(yours) or yours.startswith(mine))
    return kind(text) == kind(answer) and not inflected


def _script(text: str) -> str:
    return unicodedata.name(text[0], "UNKNOWN").split()[0]
