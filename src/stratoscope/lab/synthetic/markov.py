"""Chains whose transitions are drawn anew for each row: they must be learned while reading.

    transitions[state] ~ Dirichlet(concentration, ..., concentration)
    best:  p(next | prefix) = (times next followed this state + concentration)
                              / (times this state was left + states * concentration)

The first state is uniform. The best predictor counts bigrams of its own context: what an induction
head does. One that knows only how often each state occurs (unigrams) is clearly worse.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.lab.synthetic._stream import Stream, other


def stream(
    *,
    seed: int = 0,
    split: str = "train",
    states: int = 8,
    length: int = 64,
    concentration: float = 0.3,
) -> Stream:
    """Rows of states 0 .. states - 1; every token but the first is a target. Raises InputError for
    fewer than two states."""
    if states < 2 or length < 2 or concentration <= 0:
        raise InputError(
            f"markov needs two states and two places, and a concentration above 0; got {states}, "
            f"{length}, {concentration}."
        )

    def draw(generator: torch.Generator, n: int) -> Int[Tensor, "row position"]:
        rows = _dirichlet((n, states, states), concentration, generator)
        ids = torch.randint(states, (n, length), generator=generator)
        for place in range(1, length):
            chances = rows[torch.arange(n), ids[:, place - 1]]
            ids[:, place] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return ids

    def best(ids: Int[Tensor, "row position"]) -> Float[Tensor, "row position state"]:
        return bigrams(ids, states, concentration)

    def pair(ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int], int, int]:
        """As much of the row as ends before another state, clearly the likeliest; two states change
        names wherever they stand, and so do their chances."""
        probabilities = best(ids[None])[0]
        top = probabilities.topk(2, dim=-1)
        clear = (top.indices[:, 0] != ids) & (top.values[:, 0] > top.values[:, 1])
        if not clear.any():
            raise InputError("markov: a row in which nothing is likely to follow: make it longer.")
        end = int(torch.nonzero(clear)[-1])
        answer, clean = int(top.indices[end, 0]), ids[: end + 1]
        foil = other(answer, [s for s in range(states) if s != int(ids[end])], generator)
        names = torch.arange(states)
        names[answer], names[foil] = foil, answer
        return clean.tolist(), names[clean].tolist(), answer, foil

    return Stream(
        "markov",
        seed,
        split,
        states,
        length,
        torch.arange(length) > 0,
        1 / states,
        "Which state follows, where each row has transitions of its own. In the corrupt prompt two "
        "states have changed names. Being right does not show that pairs were counted: states that "
        "are common in the row are often right as well.",
        "in-context learning of Markov chains (Edelman et al. 2024, arXiv:2402.11004)",
        draw,
        best,
        pair,
    )


def bigrams(
    ids: Int[Tensor, "row position"], states: int, concentration: float
) -> Float[Tensor, "row position state"]:
    """The posterior mean of the transitions from each position's state, given all before it."""
    earlier = torch.ones(ids.shape[1], ids.shape[1]).tril(-1).bool()
    same = (ids[:, :, None] == ids[:, None, :]) & earlier  # (row, here, there)
    following = torch.nn.functional.one_hot(ids.roll(-1, dims=1), states).float()
    counts = same.float() @ following + concentration
    return counts / counts.sum(dim=-1, keepdim=True)


def _dirichlet(shape: tuple[int, ...], a: float, generator: torch.Generator) -> Tensor:
    """Gamma variates by their total (torch's own take no generator for a Dirichlet)."""
    drawn = torch._standard_gamma(  # pyright: ignore[reportPrivateImportUsage]
        torch.full(shape, a, dtype=torch.float64), generator=generator
    )
    drawn = drawn.clamp_min(1e-300)
    return (drawn / drawn.sum(dim=-1, keepdim=True)).float()
