"""Sentences of the report on planted results: the verb fits; what chance reaches is no
cause."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope.report import words


def sweep(effect: list[list[float]], bound: float, other: str = "head") -> xr.Dataset:
    """What patching gives of one example: 20 random draws, the largest of all places at `bound`."""
    grid = xr.DataArray(np.array(effect), dims=("layer", other))
    found = xr.Dataset({"effect": grid, "bound": bound}, attrs={"draws": 20})
    return found.assign_coords({name: range(size) for name, size in grid.sizes.items()})


@pytest.mark.parametrize(
    ("effect", "bound", "said"),
    [
        # README's second command before: 0.23 and 0.18 under a null of 0.34 were "caused by"
        ([[0.23, 0.18]], 0.34, "No head exceeds chance: the largest effect is +0.23 at L0H0, and "
         "the largest of all heads reaches 0.34 in 20 random draws."),
        ([[-0.10, 0.02]], 0.12, "No head exceeds chance: the largest effect is −0.10 at L0H0, and "
         "the largest of all heads reaches 0.12 in 20 random draws."),
        ([[0.75, 0.02]], 0.10, "One head exceeds chance: L0H0 (+0.75), where the largest of all "
         "heads reaches 0.10 in 20 random draws."),
        ([[0.3, -0.5], [0.1, 0.0]], 0.2, "2 heads exceed chance: L0H1 (−0.50) and L0H0 (+0.30), "
         "where the largest of all heads reaches 0.20 in 20 random draws."),
        ([[0.3, 0.4, 0.5, 0.6]], 0.1, "4 heads exceed chance, the strongest L0H3 (+0.60), L0H2 "
         "(+0.50) and L0H1 (+0.40), where the largest of all heads reaches 0.10 in 20 random "
         "draws."),
        ([[np.nan, np.nan]], np.nan, ""),
    ],
)  # fmt: skip
def test_heads_are_causes_only_beyond_chance(
    effect: list[list[float]], bound: float, said: str
) -> None:
    assert words.strongest_heads(sweep(effect, bound)) == said


def test_without_a_null_nothing_is_a_cause() -> None:
    found = sweep([[0.9, 0.1]], np.nan)
    assert words.causes(found) == []
    assert "no null was drawn" in words.strongest_heads(found)


@pytest.mark.parametrize(
    ("raises", "lowers", "said"),
    [
        # L23H3 of SmolLM2
        (-0.08, 2.94, "suppresses “␣John” (−2.94) and hardly touches “␣Mary” (−0.08)"),
        (2.87, 0.57, "raises “␣Mary” (+2.87) and suppresses “␣John” (−0.57)"),
        (2.0, 0.0, "raises “␣Mary” (+2.00) and hardly touches “␣John” (0.00)"),
        (-1.2, -0.1, "suppresses “␣Mary” (−1.20) and hardly touches “␣John” (+0.10)"),
        (-0.5, -1.6, "raises “␣John” (+1.60) and suppresses “␣Mary” (−0.50)"),
    ],
)
def test_the_verb_is_of_the_larger_half(raises: float, lowers: float, said: str) -> None:
    assert words.writes(raises, lowers, " Mary", " John") == said


@pytest.mark.parametrize(
    ("effect", "bound", "said"),
    [
        ([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.0, 0.9]], 0.1,
         "The residual stream restores most at token 0 “0” in layers 0 to 1, then at token 1 “1” "
         "in layers 2 to 3."),
        ([[0.09, 0.0], [0.05, 0.0]], 0.1,
         "No token’s residual stream restores more than chance in any layer: the largest of all "
         "places reaches 0.10 in 20 random draws."),
    ],
)  # fmt: skip
def test_tokens_carry_only_what_is_beyond_chance(
    effect: list[list[float]], bound: float, said: str
) -> None:
    assert words.carried(sweep(effect, bound, "position")) == said


INDUCTION = {"previous_token": (0.05, 0.05, 0.05), "induction": (0.7, 0.03, 0.03)}


@pytest.mark.parametrize(
    ("scores", "written", "named"),
    [
        ({"name_mover": (1.4, 0.1, 0.3)}, 1.9, "name mover"),
        ({"name_mover": (0.5, 0.1, 0.3)}, -0.01, ""),  # L23H5: it writes nothing towards the answer
        ({"name_mover": (0.2, 0.0, 0.3)}, 1.0, ""),  # under the largest null of all heads
        ({"name_mover": (-1.0, 0.1, 0.3), **INDUCTION}, -1.17, "negative name mover"),  # L24H4
        ({"name_mover": (np.nan, np.nan, np.nan), **INDUCTION}, 0.2, "induction head"),
        ({"previous_token": (0.2, 0.05, 0.05)}, 0.2, ""),
        ({"name_mover": (1.4, 0.1, 0.3)}, None, ""),  # what it writes is not known
    ],
)
def test_a_role_needs_its_null_beaten_and_its_direction(
    scores: dict, written: float | None, named: str
) -> None:
    assert words.role(scores, written) == named


def test_roles_are_said_in_english() -> None:
    named = [("L1H2", "induction head"), ("L3H4", "name mover")]
    assert words.are(named) == "L1H2 is an induction head and L3H4 is a name mover"


def test_the_writers_are_named_with_what_they_do() -> None:
    direct = xr.Dataset(
        {
            "contribution": ("component", [2.86, -1.17, 0.1]),
            "raises_answer": ("component", [-0.08, -1.10, 0.1]),
            "lowers_foil": ("component", [2.94, -0.07, 0.0]),
            "logit_difference": 1.79,
        },
        coords={"component": ["L23H3", "L24H4", "embed"]},
    )
    assert words.writers(direct, " Mary", " John") == (
        "L23H3 adds most to the difference of +1.79 (+2.86 logits): it suppresses “␣John” (−2.94) "
        "and hardly touches "
        "“␣Mary” (−0.08). L24H4 takes most from it (−1.17 logits): it suppresses “␣Mary” (−1.10) "
        "and hardly touches "
        "“␣John” (+0.07)."
    )
