"""Verbalize: a paragraph for each prompt that says in words what a saliency map says in numbers,
and no more.

Paper: saliency-verbalization

    share[position] = |attribution[position]| / sum_position |attribution[position]|

The paragraph is filled in, not generated, and `check` reads it back against the numbers. It cites
the tokens with the largest share, says for each whether it pushes towards the answer or the foil,
and says so when they hold less than a third of the way from an even share to all of it (diffuse),
or when a second method, where one is given, does not confirm most of them.

Reads as: the saliency map for someone who does not read charts. Does not show more than that map:
it is as right as the method behind it, and a share of absolute attribution is not a probability.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from stratoscope.engine.metric import Target, Words, last_logits
from stratoscope.engine.sequence import target, unchanged
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.run import Each
from stratoscope.models.text import token_text
from stratoscope.results import dataset
from stratoscope.tokens import occlusion
from stratoscope.tokens._spoken import (
    CITATION,
    QUOTE,
    chance,
    opinion,
    percent,
    quoted,
    side,
    spoken,
)
from stratoscope.tokens._spoken import read_back as read_back

Map = Float[np.ndarray, " position"]
Saliency = xr.DataArray | xr.Dataset
# The report's second opinion on occlusion: the method that the rule of docs/attribution.md chose,
# with the orders that it was judged with.
SECOND, ORDERS = "tokens.shapley", 32
NO_SECOND = "No second opinion was given: Shapley values are the one to ask (docs/attribution.md)."
LEAST = 0.01  # of the total: a token with less is noise, and is not cited
DIFFUSE = "The evidence is diffuse: the choice does not rest on these tokens alone."
_NAMED = re.compile(rf"(?:token|position|answer|foil)(?: is)? {QUOTE}")


def strongest(attribution: Map, top: int) -> list[int]:
    """The positions of the largest |attribution|, largest first; never one that holds less than one
    percent."""
    share = shares(attribution)
    return [int(p) for p in np.argsort(-share, kind="stable")[:top] if share[p] >= LEAST]


def shares(attribution: Map) -> Map:
    """Each position's part of the total absolute attribution (0 everywhere when there is none)."""
    size = np.abs(np.nan_to_num(attribution)).astype(np.float64)
    return size / (size.sum() or 1.0)


def describe(tokens: Sequence[str], attribution: Map, top: int) -> str:
    """What the map says: its strongest tokens, how much they hold together, and the hedge where it
    is due."""
    cited, share = strongest(attribution, top), shares(attribution)
    if not cited:
        return "no token holds one percent of the attribution."
    where = [
        f"position {p}, {percent(share[p])}, towards the {side(attribution[p])}" for p in cited
    ]
    *others, last = [f"{quoted(tokens[p])} ({at})" for p, at in zip(cited, where)]
    listed = f"{', '.join(others)} and {last}" if others else last
    return (
        f"the attribution is largest at {listed}, in parts of its absolute total. "
        f"{_together(attribution, cited)}"
    )


def check(text: str, tokens: Sequence[str], attribution: Map) -> list[str]:
    """What a paragraph says that the numbers do not support, one line each; [] when it is faithful.

    Quoted may be the answer, foil and prediction (not judged: the map does not hold them) and
    citations, `"token" (position P, S%, towards the answer|foil)`, that are true and the strongest.
    There may be no other percentage than those and that of all cited together, and the hedge must
    stand exactly where it is due.
    """
    wrong: list[str] = []
    share, citations = shares(attribution), CITATION.findall(text)
    best = strongest(attribution, len(citations))
    cited = sorted(
        {int(position) for _, position, _, _ in citations if int(position) < len(tokens)}
    )
    for quote, position, part, towards in citations:
        p = int(position)
        if p not in cited or json.loads(quote) != tokens[p]:
            wrong.append(f"{quote} does not stand at position {p}.")
        elif p not in best:
            wrong.append(
                f"{quote} at position {p} is not among the {len(citations)} strongest, {best}."
            )
        elif (f"{part}%", towards) != (percent(share[p]), side(attribution[p])):
            wrong.append(
                f"{quote} at position {p}: {percent(share[p])}, towards the {side(attribution[p])}."
            )
    if len(cited) < len(citations) or bool(citations) != bool(strongest(attribution, 1)):
        wrong.append(
            "it cites a token twice, or one that is not there, or none although some have "
            "attribution."
        )
    together = _together(attribution, cited) if cited else ""
    if together not in text:
        wrong.append(f"it should say: {together}")
    rest = _NAMED.sub("", CITATION.sub("", text)).replace(together, "")
    wrong += [
        f"{quote} is quoted but not cited with its numbers." for quote in re.findall(QUOTE, rest)
    ]
    wrong += [
        f"{number} is no share of what is cited." for number in re.findall(r"[\d.]+\s*%", rest)
    ]
    return wrong + ([f"it should not say: {DIFFUSE}"] if DIFFUSE in rest else [])


def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    saliency: Saliency | None = None,
    second: Saliency | None = None,
    top: int = 3,
) -> xr.Dataset:
    """text, probability, logit_difference, agreement (example); cited, share, direction (example,
    rank).

    answer, foil: default as `target` chooses. saliency: attribution (example, position) of these
    prompts, as this room's methods give it (default: occlusion). second: another to compare it with
    (default: none, and the text says so). top: tokens cited at most; where fewer hold one percent,
    cited is -1, share NaN, direction "". agreement: how many cited tokens are also the second's,
    with the same sign; -1 without a second. Raises InputError when a saliency is of other prompts,
    or of another answer or foil.
    """
    if top < 1:
        raise InputError(f"top={top}: cite at least one token.")
    batch = lm.batch(inputs)
    wanted = target(lm, batch, answer, foil)
    first = occlusion.measure(lm, batch, **wanted.words) if saliency is None else saliency
    method = str(first.attrs.get("method", ""))
    against = "" if second is None else str(second.attrs.get("method", ""))
    maps = _map(first, batch, wanted)
    others = None if second is None else _map(second, batch, wanted)
    prediction = _prediction(lm, batch, wanted)
    texts, agreement, ranks = [], [], []
    for e, (tokens, row, start) in enumerate(zip(batch.tokens, maps, prediction.pop("text"))):
        cited, second_says = strongest(row, top), f" {NO_SECOND}"
        if others is None:
            agreement.append(-1)
        else:
            same = [
                p for p in cited if p in strongest(others[e], top) and row[p] * others[e][p] > 0
            ]
            agreement.append(len(same))
            second_says = opinion(against, len(same), len(cited))
        about = f"By {spoken(method)}, {describe(tokens, row[: len(tokens)], top)}"
        texts.append(f"{start} {about}{second_says}")
        ranked = [(p, shares(row)[p], side(row[p])) for p in cited]
        ranks.append(ranked + [(-1, np.nan, "")] * (min(top, maps.shape[1]) - len(cited)))
    by_rank = {
        n: [[cell[i] for cell in row] for row in ranks]
        for i, n in enumerate(("cited", "share", "direction"))
    }
    coords = {
        "prediction": (("example",), prediction.pop("token")),
        "example_text": batch.coords()["example_text"],
    }
    return dataset(
        {
            name: (("example",), values)
            for name, values in ({"text": texts, "agreement": agreement} | prediction).items()
        }
        | {name: (("example", "rank"), values) for name, values in by_rank.items()},
        method="tokens.verbalize",
        provenance=lm.provenance,
        settings={"saliency": method, "second": against, "top": top},
        coords=coords | wanted.coords,
        notes=" ".join(wanted.notes),
    )


def _map(saliency: Saliency, batch: Batch, wanted: Target) -> Float[np.ndarray, "example position"]:
    """The attribution; refused when it says that it is of other prompts, or of another answer or
    foil."""
    array = saliency["attribution"] if isinstance(saliency, xr.Dataset) else saliency
    for name, (_, now) in ({"text": batch.coords()["text"]} | wanted.coords).items():
        then = array.coords[name].values.tolist() if name in array.coords else now
        if then != now:
            raise InputError(
                f"the saliency was measured for {name} {then}, not {now}: ask both for the same."
            )
    if set(array.dims) != {"example", "position"} or array.size != batch.mask.numel():
        raise InputError(
            f"the saliency has axes {dict(array.sizes)}; needed is (example, position) of these "
            "prompts."
        )
    return array.transpose("example", "position").values


def _prediction(lm: LM, batch: Batch, wanted: Target) -> dict[str, list[Any]]:
    """For each example the model's own prediction, and in words how answer and foil stand."""
    logits = last_logits(lm, batch).float()
    best = logits.softmax(dim=-1).max(dim=-1)
    prediction = {
        "token": [token_text(lm.tokenizer, int(i)) for i in best.indices],
        "probability": best.values.tolist(),
    }
    prediction["logit_difference"] = unchanged(lm, batch, wanted, logits).tolist()
    score = "log probability" if wanted.tokens else "logit"
    masked = isinstance(lm.readout.place(batch), Each)
    where = "mask" if masked else "last position"
    place = "next token" if lm.family.towers[""].causal else f"token at the {where}"
    text = [
        f"The most likely {place} is {quoted(token)} (probability {chance(probability)}). The "
        f"{score} of the answer "
        f"{quoted(answer)} is {abs(d):.2f} {'above' if d >= 0 else 'below'} that of the foil "
        f"{quoted(foil)}."
        for token, probability, d, answer, foil in zip(
            *prediction.values(), wanted.answer_text, wanted.foil_text
        )
    ]
    return prediction | {"text": text}


def _together(attribution: Map, cited: Sequence[int]) -> str:
    """What the cited tokens hold together, and a hedge when that is less than a third of the way
    from an even share to all."""
    count, n = len(cited), int(np.isfinite(attribution).sum())
    held, even = shares(attribution)[list(cited)].sum(), count / n
    subject = "Together they hold" if count > 1 else "Alone it holds"
    counted = (
        f"{subject} {percent(held)}; {count} of {n} would hold {percent(even)} if all tokens "
        "counted alike."
    )
    return f"{counted} {DIFFUSE}" if count < n and held < even + (1 - even) / 3 else counted
