"""Simulatability: which spans a saliency map would have one say, how much they hold, and whether
they give the answer away.

Paper: saliency-verbalization

    score[span]  = sum over its positions of |attribution|           spans of `width` tokens; the
                                                                     best first, none overlap
    coverage     = sum of share[position] over the spans' positions  share: part of the total
                                                                     absolute attribution
    kept         = d(prompt in which only the spans keep their embeddings)
    held         = sum of share[p] v[p] over the p that raise, the same over those that lower, and
                   both sums of share[p]                             v: vectors of words, length 1

d is the logit difference answer - foil at the last token. `kept` lets the model itself be the
reader who is shown the cited words alone. `read` is another reader, who has learned from other
texts how signed words and answers go together: give it heat maps, or what a paragraph tells of them
(`verbalize.read_back`), and compare what it tells right, text by text. Which words to cite is what
`verbalize` takes for granted: it cites the strongest tokens one by one.

null: as many spans of the same width at random places.
Reads as: how much of a map so few words carry, and whether a reader of them would know the answer.
Does not show that people would: neither reader is one. The model on a prompt full of holes is not
on familiar ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int

from stratoscope.engine.entry import ENTRY, entry, evidence
from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.sequence import swept, target
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens import gradient_times_input, verbalize

NULL = "as many spans of the same width at random places"
Map = Float[np.ndarray, " position"]


def spans(attribution: Map, width: int, count: int) -> list[range]:
    """The `count` windows of `width` positions with the largest sum of |attribution|, best first;
    none overlap.

    NaN is never cited. There are fewer where no more fit; a map shorter than `width` has none.
    """
    # what differs by rounding is equal: the first one wins
    size = np.round(verbalize.shares(attribution), 9)
    size = np.where(np.isnan(attribution), -np.inf, size)
    score = np.convolve(size, np.ones(width), "valid") if len(size) >= width else np.empty(0)
    return _apart(np.argsort(-score, kind="stable")[: int(np.isfinite(score).sum())], width, count)


def anywhere(
    attribution: Map, width: int, count: int, generator: np.random.Generator
) -> list[range]:
    """As many windows at random places without NaN."""
    starts = [
        p
        for p in range(len(attribution) - width + 1)
        if not np.isnan(attribution[p : p + width]).any()
    ]
    return _apart(generator.permutation(np.array(starts, dtype=int)), width, count)


def _apart(starts: Int[np.ndarray, " window"], width: int, count: int) -> list[range]:
    chosen: list[range] = []
    for start in map(int, starts):
        if len(chosen) < count and all(abs(start - other.start) >= width for other in chosen):
            chosen.append(range(start, start + width))
    return chosen


def coverage(attribution: Map, cited: list[range]) -> float:
    """The part of the total absolute attribution that the cited positions hold."""
    return float(verbalize.shares(attribution)[[p for span in cited for p in span]].sum())


def guessed(
    features: Float[np.ndarray, "example feature"],
    labels: Bool[np.ndarray, " example"],
    *,
    ridge: float = 1.0,
) -> Bool[np.ndarray, " example"]:
    """The label of each example as a linear reader guesses it who has learned from all the others
    (ridge regression).

    With features that say nothing the guess is the commoner label among the others; on a tie,
    False.
    """
    moved = features - features.mean(axis=0)
    x = np.column_stack(
        [moved / (np.sqrt((moved**2).sum(axis=1).mean()) or 1.0), np.ones(len(features))]
    )
    free = np.diag([ridge] * (x.shape[1] - 1) + [1e-9])  # the constant is not held small
    hat = x @ np.linalg.solve(x.T @ x + free, x.T)
    y, own = np.where(labels, 1.0, -1.0), np.diag(hat)
    # what it would be if the example had been left out
    return (hat @ y - own * y) / (1 - own) > 1e-9


def held(
    vectors: Float[np.ndarray, "position dim"], attribution: Map
) -> Float[np.ndarray, " feature"]:
    """What a reader holds of a map: the sums over the words that raise the answer, then over those
    that lower it, of share times vector; and how much there is of either. 2 dim + 2 numbers.

    vectors: one for each position, 0 for a word that the reader does not know; they are taken at
    length 1. attribution: as it is shown: shares, or numbers in any other unit; NaN is not shown.
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    words = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    words = np.column_stack([words, np.ones(len(words))])
    shown = np.nan_to_num(attribution)
    return np.concatenate([shown.clip(0) @ words, -shown.clip(None, 0) @ words])


def read(
    vectors: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    labels: Bool[np.ndarray, " example"],
    *,
    ridge: float = 1.0,
) -> Bool[np.ndarray, " example"]:
    """Whether a linear reader tells each label right, who is shown each text's map and has learned
    from all the other texts (`held`, `guessed`).

    vectors: (position, dim) of each text. maps: (position,) of each. Raises InputError where they
    are not as many, or do not fit each other.
    """
    if not len(vectors) == len(maps) == len(labels) or any(
        len(v) != len(m) for v, m in zip(vectors, maps)
    ):
        raise InputError(
            f"{len(vectors)} texts, {len(maps)} maps, {len(labels)} labels: give one of each for "
            "every text, and a number for each of its words."
        )
    features = np.stack([held(v, m) for v, m in zip(vectors, maps)])
    return guessed(features, labels, ridge=ridge) == labels


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    saliency: xr.DataArray | xr.Dataset | None = None,
    width: int = 1,
    count: int = 3,
    ask: int = 1,
    seed: int = 0,
) -> xr.Dataset:
    """coverage, null_coverage, logit_difference, kept, null_kept (example), cited (example,
    position).

    answer, foil: default as `target` chooses. saliency: attribution (example, position) of these
    prompts (default: gradient times input). ask: so many tokens at the end are the question: always
    kept, never cited. seed: of the null. Differences in logits, shares from 0 to 1; cited is False
    at padding.
    """
    if min(width, count, ask) < 1:
        raise InputError(f"width={width}, count={count}, ask={ask}: each must be at least 1.")
    batch = lm.batch(inputs)
    wanted = target(lm, batch, answer, foil)
    with torch.enable_grad():
        result = (
            gradient_times_input.measure(lm, batch, **wanted.words)
            if saliency is None
            else saliency
        )
    array = result["attribution"] if isinstance(result, xr.Dataset) else result
    if set(array.dims) != {"example", "position"} or array.size != batch.mask.numel():
        raise InputError(
            f"the saliency has axes {dict(array.sizes)}; needed is (example, position) of these "
            "prompts."
        )
    maps = array.transpose("example", "position").values
    x, blank = entry(lm, batch, "mean")
    real = evidence(batch).cpu().numpy()
    question = np.zeros_like(real)
    rows_of: dict[str, list[Any]] = {"": [], "null_": []}
    for row, (values, length) in enumerate(zip(maps, batch.lengths.tolist())):
        question[row, max(length - ask, 0) : length] = True
        values = np.where(question[row] | ~real[row], np.nan, values)
        rows_of[""].append((values, spans(values, width, count)))
        rows_of["null_"].append(
            (values, anywhere(values, width, count, np.random.default_rng([seed, row])))
        )
    out: dict[str, Any] = {}
    cells = [replaced(ENTRY, x)]  # changes nothing: the difference of the whole prompt
    for before, rows in rows_of.items():
        shown = np.zeros_like(real)
        for row, (_, cited) in enumerate(rows):
            shown[row, [p for span in cited for p in span]] = True
        keep = torch.as_tensor(shown | question).to(x.device)[..., None]
        cells.append(replaced(ENTRY, torch.where(keep, x, blank)))
        out[f"{before}coverage"] = (
            ("example",),
            [coverage(values, cited) for values, cited in rows],
        )
        out[f"{before}cited"] = (("example", "position"), shown)
    names = ("logit_difference", "kept", "null_kept")
    found_by = dict(zip(names, swept(lm, batch, cells, wanted)))
    out |= {name: (("example",), values.float()) for name, values in found_by.items()}
    return dataset(
        out,
        method="tokens.simulatability",
        provenance=lm.provenance,
        settings={
            "saliency": str(result.attrs.get("method", "")),
            "width": width,
            "count": count,
            "ask": ask,
        },
        seed=seed,
        coords=batch.coords() | wanted.coords,
        null_kind=NULL,
        notes=" ".join(wanted.notes),
    )
