"""Shapley values: what each token adds to the logit difference, whichever others are there.

Paper: textbook (Shapley, "A Value for n-Person Games", 1953; Castro et al., "Polynomial Calculation
of the Shapley Value Based on Sampling", 2009; Lundberg and Lee, "A Unified Approach to Interpreting
Model Predictions", 2017)

    attribution[i] = mean over orders of  d(those before i, and i) - d(those before i)

d(S) is the logit difference answer - foil at the last token when only the tokens S are there; an
absent one has another embedding at its position. Orders are drawn in pairs, one the reverse of the
other; in each of them the attributions sum to d(all) - d(none) exactly. `standard_error` is over
pairs; all subsets of at most 10 tokens leave none.

Reads as: what each token brings, alone and beside others, so that two tokens that stand in for one
another share what they do. Does not show which of them the model used here, and other words for
"absent" ask another question.
Cost: about (tokens x permutations) passes.
"""

from __future__ import annotations

from math import comb
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.entry import ENTRY, entry, evidence
from stratoscope.engine.estimate import announce
from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.sequence import swept, target
from stratoscope.engine.sweep import Progress
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens import _kinds

MOST = 10  # tokens whose every subset is asked: 1024 passes
# (which words stand for absent ones, the positions that are absent)
Game = list[tuple[int, tuple[int, ...]]]


def marginals(
    order: Int[Tensor, "draw token"], value: Float[Tensor, "draw present"]
) -> Float[Tensor, "draw token"]:
    """What each token added when it came; value[:, k] is d with the first k tokens of the order
    there."""
    return torch.zeros_like(value[:, 1:]).scatter(1, order, value.diff(dim=1))


def exact(value: Float[Tensor, " subset"]) -> Float[Tensor, " token"]:
    """From d of every subset; bit i of a subset's number says whether token i is there."""
    n = len(value).bit_length() - 1
    subset = torch.arange(len(value), device=value.device)
    size = sum((subset >> i) & 1 for i in range(n))
    weight = torch.tensor([1 / (n * comb(n - 1, s)) for s in range(n)]).to(value)
    without = [subset[(subset >> i) & 1 == 0] for i in range(n)]
    return torch.stack(
        [(weight[size[s]] * (value[s + (1 << i)] - value[s])).sum() for i, s in enumerate(without)]
    )


_NARROW = "Give fewer or shorter prompts; `gradient_times_input` takes two passes."


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    absent: str | int = "kind",
    permutations: int | Literal["all"] = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """attribution, standard_error (example, position), logit_difference, absent_difference, passes
    (example); in logits.

    answer, foil: one for all examples or one each (default: as `target` chooses); `metric.Whole`
    texts are scored with all their tokens. absent: what stands for a token that is not there:
    "kind" (words of its kind, drawn anew for every pair of orders), "mean", "zero", or one token,
    as its text or id. permutations: an even number of orders, or "all": every subset of at most 10
    tokens, exactly. absent_difference: d(none), its mean over draws. Special tokens are always
    there and get 0; NaN at padding and at image tokens. Raises SiteError for a model without token
    embeddings or read-out, InputError for inputs without tokens, a bad option, or too many tokens
    for "all".
    """
    _refuse(permutations, absent)
    batch = lm.batch(inputs)
    x, blank = entry(lm, batch, "mean" if absent == "kind" else absent)
    wanted = target(lm, batch, answer, foil)
    who = [row.nonzero()[:, 0].tolist() for row in _kinds.players(lm, batch)]
    pairs = 0 if permutations == "all" else permutations // 2
    blanks = blank[None].expand(max(pairs, 1), *blank.shape)
    if absent == "kind":
        blanks = _kinds.entries(lm, batch, _kinds.words(lm, batch, pairs, seed, wanted))
    orders = [_orders(len(places), pairs, seed) for places in who]
    games = [_game(places, order, absent == "kind") for places, order in zip(who, orders)]
    passes = max(map(len, games)) * wanted.runs
    announce(lm, batch, passes, f"Shapley values of {batch.ids.shape[1]} tokens", _NARROW)
    scores = swept(lm, batch, _cells(x, blanks, games), wanted, progress=progress).double().cpu()
    attribution, error = torch.zeros(2, *batch.ids.shape, dtype=torch.float64)
    ends = torch.zeros(2, len(batch), dtype=torch.float64)
    for e, (places, order, game) in enumerate(zip(who, orders, games)):
        score_of = dict(zip(game, scores[: len(game), e].tolist()))
        attribution[e, places], error[e, places], ends[:, e] = _values(
            score_of, places, order, absent == "kind"
        )
    gap = torch.where(evidence(batch).cpu(), 0.0, torch.nan)
    axes = ("example", "position")
    return dataset(
        {
            "attribution": (axes, (attribution + gap).float()),
            "standard_error": (axes, (error + gap).float()),
            "logit_difference": (("example",), ends[0].float()),
            "absent_difference": (("example",), ends[1].float()),
            "passes": (("example",), torch.tensor([len(game) for game in games])),
        },
        method="tokens.shapley",
        provenance=lm.provenance,
        settings={"absent": absent, "permutations": permutations},
        seed=seed,
        coords=batch.coords() | wanted.coords,
        notes=" ".join(wanted.notes),
    )


def _refuse(permutations: int | Literal["all"], absent: str | int) -> None:
    if permutations != "all" and (permutations < 2 or permutations % 2):
        raise InputError(
            f"permutations={permutations}: orders come in pairs, give an even number or 'all'."
        )
    if permutations == "all" and absent == "kind":
        raise InputError(
            "permutations='all' asks one game: say which, with absent='mean', 'zero' or a token."
        )


def _cells(x: Tensor, blanks: Tensor, games: list[list[Any]]) -> list[list[Intervention]]:
    """The n-th subset of every example's game, made together."""
    return [
        [_change(x, blanks, e, *game[number]) for e, game in enumerate(games) if number < len(game)]
        for number in range(max(map(len, games)))
    ]


def _orders(n: int, pairs: int, seed: int) -> Int[Tensor, "order token"]:
    """Orders and their reverses, side by side; alike for every example, whatever its batch. No
    pairs: all subsets."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(n, generator=generator) for _ in range(pairs)]
    if not pairs and n > MOST:
        raise InputError(
            f"permutations='all': {n} tokens have {2**n} subsets; give at most {MOST} tokens or a "
            "number."
        )
    return (
        torch.stack([side for one in drawn for side in (one, one.flip(0))])
        if pairs
        else torch.empty(0, n).long()
    )


def _steps(places: list[int], order: Tensor, redrawn: bool) -> list[Game]:
    """For each order (or for the one game of all subsets), what is absent at every step."""
    n = len(places)
    if not len(order):
        return [
            [(0, tuple(p for i, p in enumerate(places) if not s >> i & 1)) for s in range(2**n)]
        ]
    return [
        [
            (row // 2 if redrawn and k < n else 0, tuple(sorted(places[i] for i in one[k:])))
            for k in range(n + 1)
        ]
        for row, one in enumerate(order.tolist())
    ]


def _game(places: list[int], order: Tensor, redrawn: bool) -> Game:
    """Every pass that is needed, once."""
    return list(dict.fromkeys(step for steps in _steps(places, order, redrawn) for step in steps))


def _change(
    x: Tensor, blanks: Tensor, example: int, draw: int, gone: tuple[int, ...]
) -> Intervention:
    """The absent tokens' entry; of the whole prompt, what is there anyway."""
    at = list(gone) or [0]
    value = blanks[draw, example, at] if gone else x[example, at]
    return replaced(ENTRY, value, positions=at, examples=[example])


def _values(
    score_of: dict[tuple[int, tuple[int, ...]], float],
    places: list[int],
    order: Tensor,
    redrawn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attribution and standard error of each place, and d of all and of none."""
    value = torch.tensor(
        [[score_of[step] for step in steps] for steps in _steps(places, order, redrawn)]
    ).double()
    ends = torch.stack([value[0, -1], value[:, 0].mean()])
    if not len(order):
        return exact(value[0]), torch.zeros(len(places)).double(), ends
    pair = marginals(order, value).unflatten(0, (-1, 2)).mean(dim=1)
    error = (
        pair.std(dim=0) / len(pair) ** 0.5 if len(pair) > 1 else torch.full_like(pair[0], torch.nan)
    )
    return pair.mean(dim=0), error, ends
