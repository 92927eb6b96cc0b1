"""Retrieval score: how often a head looks at the very needle token that the model says next, in a
long haystack.

Paper: retrieval-heads

    text         = haystack[:depth]  needle  haystack[depth:]  question              the model goes
                                                               on; question = needle[:cue] if not
                                                               given
    hit[h, t]    = [the model says needle[t]]  and  j in needle  and  x_j = needle[t],   j =
                                                                      argmax_key pattern[h, t]
    score[h]     = mean over t = cue .. n-1 of hit[h, t]

pattern[h, t] is that of the position which says needle[t]. Instead of decoding, one pass is given
the whole needle again, and every needle token is asked at once. Where the model recites the needle
this is greedy decoding exactly; after a mistake it is put right again, where decoding would go
astray. The paper divides the set of copied words by the set of the needle's words; here each token
counts, and those given as cue do not. The token that a tokenizer begins every text with (<s>)
stands once, before the haystack.

Asked by needle[:cue], as by default, the needle's own words stand before what is asked for, and any
induction head finds it. The paper asks a question in other words. Of an answer of several tokens
the later ones follow the earlier as they did in the needle, which is induction again: ask for one.

null: attention that reads alike all it may see, on the tokens that the model says.
Reads as: who copies out of the context, token by token. Does not show that the model needs this
head: mask it (`engine.intervene.ablate`). A head that always looks there, and copies nothing,
scores as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.pieces import before, pieces
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models import finite, source
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = (
    "uniform attention over what may be seen: the share of it on the right token inside the needle"
)


def hits(
    pattern: Float[Tensor, "layer head query key"], match: Bool[Tensor, "query key"]
) -> Bool[Tensor, "layer head query"]:
    """Whether each query's most attended key is a match; of equal keys, the first is meant."""
    best = pattern.argmax(dim=-1)
    return torch.stack([row[best[..., number]] for number, row in enumerate(match)], dim=-1)


def matches(
    ids: Int[Tensor, " key"], predicted: Int[Tensor, " query"], start: int, stop: int
) -> Bool[Tensor, "query key"]:
    """Which positions hold the token that a query's position says, inside the needle (start to stop
    - 1)."""
    place = torch.arange(len(ids), device=ids.device)
    return (predicted[:, None] == ids) & (place >= start) & (place < stop)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    haystack: Any = None,
    cue: int | Sequence[int] = 1,
    question: Any = None,
    depth: float = 0.5,
    length: int = 64,
    seed: int = 0,
) -> xr.Dataset:
    """Score and null of every head on every needle, (example, layer, head); recall, the share of
    tokens said, (example,).

    inputs: needles. haystack: a text or ids, of which the first `length` tokens are used; default
    random tokens, drawn from `seed`, none in the needle and none twice. cue: how many of the
    needle's first tokens are not asked for, one number or one for each. question: texts or ids, one
    for each needle, said at the end in the place of these first tokens. depth: where in the
    haystack the needle lies, 0 to 1. A haystack too long for the model's context is cut, with a
    note. Raises InputError for a needle with nothing left after its cue; SiteError for a model that
    does not predict the next token, or whose attention cannot be seen.
    """
    lm.layout.resolve(["layers.*.attn.pattern", "logits"])
    if not lm.family.towers[""].causal or not lm.family.reads_text:
        raise SiteError(
            f"{lm.family.name} does not go on from a text: it cannot be asked to recite a needle."
        )
    source.refuse(lm, "a needle would be hidden in what the encoder reads, and is not said again")
    needles = pieces(lm, inputs)
    batch = lm.batch(needles)
    cues = [cue] * len(batch) if isinstance(cue, int) else list(cue)
    if len(cues) != len(batch) or not 0.0 <= depth <= 1.0:
        raise InputError(
            f"{len(cues)} cues for {len(batch)} needles, depth={depth}: one cue each, a depth of 0 "
            "to 1."
        )
    questions = [None] * len(batch) if question is None else pieces(lm, question)
    if len(questions) != len(batch) or not all(ids is None or ids for ids in questions):
        raise InputError(
            f"{len(questions)} questions for {len(batch)} needles: one each, none of them empty."
        )
    score, chance, recall, notes = [], [], [], []
    for needle, given, ask in zip(needles, cues, questions):
        if not 1 <= given < len(needle):
            raise InputError(
                f"cue={given} of a needle of {len(needle)} tokens: at least one is given and one "
                "is asked."
            )
        end = (needle[:given] if ask is None else ask) + needle[given:-1]
        hay = _haystack(lm, haystack, needle, end, length, seed)
        if len(hay) < length:
            notes.append(f"Haystacks have {len(hay)} tokens, not {length}.")
        values = _one(lm, hay, needle, end, given, round(depth * len(hay)))
        for column, value in zip((score, chance, recall), values):
            column.append(value)
    scores = torch.stack(score)
    axes = ("example", "layer", "head")
    return dataset(
        {
            "score": (axes, scores),
            "null": (axes, torch.stack(chance)[:, None, None].expand_as(scores)),
            "recall": (("example",), torch.stack(recall)),
        },
        method="heads.retrieval_score",
        provenance=lm.provenance,
        settings={"cue": cue, "depth": depth, "length": length, "asked": question is not None},
        seed=seed,
        coords={
            "layer": list(range(scores.shape[1])),
            "head": list(range(scores.shape[2])),
            "needle": (("example",), batch.coords()["example_text"][1]),
        },
        null_kind=NULL,
        notes=" ".join(dict.fromkeys(notes)),
    )


def text(hay: Sequence[int], needle: Sequence[int], end: Sequence[int], at: int) -> list[int]:
    """The prompt: the needle after `at` tokens of the haystack, and at the end a question, or the
    needle's cue again."""
    return [*hay[:at], *needle, *hay[at:], *end]


def _one(
    lm: LM, hay: list[int], needle: list[int], end: list[int], cue: int, at: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Score (layer, head), chance and recall of one needle."""
    start = before(lm)
    at += len(start)
    inputs = lm.batch([text([*start, *hay], needle, end, at)])
    ids = inputs.text[0][0]
    asks = list(range(cue - len(needle), 0))
    anew = outside.reads_out_anew(lm)
    last = "logits" if anew else f"layers.{lm.dims.layers - 1}.resid_post"
    seen = capture(lm, inputs, "layers.*.attn.pattern", last, positions=asks)
    pattern = seen.stack("layers.*.attn.pattern")[:, 0].float()
    right = torch.tensor(needle[cue:], device=pattern.device)
    logits = (seen[last] if anew else lm.readout(seen[last]))[0]
    finite.refuse({"the model's logits": logits})
    predicted = logits.argmax(dim=-1) == right
    match = matches(ids, right, at, at + len(needle)) & predicted[:, None]
    visible = torch.arange(len(ids) + asks[0], len(ids), device=match.device) + 1
    values = (
        hits(pattern, match).float().mean(dim=-1),
        (match.sum(dim=-1) / visible).mean(),
        predicted.float().mean(),
    )
    return tuple(value.cpu() for value in values)  # type: ignore[return-value]


def _haystack(
    lm: LM, given: Any, needle: Sequence[int], end: Sequence[int], length: int, seed: int
) -> list[int]:
    """The first `length` tokens, or as many as there are and the context holds beside the needle
    and what is said at the end."""
    context = getattr(lm.layout.config(), "max_position_embeddings", None) or 10**9
    reserved = len(needle) + len(end) + len(before(lm))
    room = min(length, context - lm.family.reserved_positions - reserved)
    if room < 1:
        raise InputError(
            f"length={length}: no room for a haystack beside a needle of {len(needle)} tokens and "
            f"the {len(end)} at the end."
        )
    if given is not None:
        return pieces(lm, given)[0][:room]
    known = lm.dims.vocab if lm.tokenizer is None else min(lm.dims.vocab, len(lm.tokenizer))
    special = (
        []
        if lm.tokenizer is None
        else [*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder]
    )
    order = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(known), special))
    return order[~np.isin(order, [*needle, *end])][:room].tolist()
