"""The picture of one statement: where each thing stands on its scale, and what is drawn of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from stratoscope.claims import Claim, Verdict, forest
from stratoscope.claims.paper import read
from stratoscope.claims.run import run


@pytest.fixture
def claim(folder: Path) -> Claim:
    made = read(folder / "llm_drop.py").named("attention_goes_first")[0]
    return dataclasses.replace(
        made, expect="attention <= 0.06 and attention < random", found_there={"attention": 0.024}
    )


@pytest.fixture
def verdict(folder: Path) -> Verdict:
    paper = read(folder / "llm_drop.py")
    made = run(paper, paper.named("attention_goes_first")[0])
    return dataclasses.replace(made, null={"random": 0.05}, draws={"random": (0.045, 0.055)})


def at(svg: str, value: float) -> float:
    """Where a value stands, from the labels of the scale."""
    marks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="c m">(−?[\d.]+)</text>', svg)
    places = [(float(x), float(label.replace("−", "-"))) for x, label in marks]
    (left, low), (right, high) = places[0], places[-1]
    return left + (right - left) * (value - low) / (high - low)


def number(pattern: str, svg: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, svg)]


def test_everything_stands_where_its_number_is(claim: Claim, verdict: Verdict) -> None:
    svg = forest.svg(claim, [verdict])
    near = lambda value: pytest.approx(at(svg, value), abs=0.6)  # noqa: E731
    [dot] = number(r'd="M([\d.]+) [\d.]+a4 4', svg)
    assert dot + 4 == near(0.02)
    [(x, width)] = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="2.0"', svg)
    assert float(x) == near(0.01)
    assert float(x) + float(width) == near(0.04)
    [(x, width)] = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="16.0"', svg)
    assert float(x) + 1.5 == near(0.045)
    assert float(x) + float(width) - 1.5 == near(0.055)
    assert number(r'stroke-dasharray="4 3" d="M([\d.]+)', svg) == [near(0.06)]
    assert number(r'd="M([\d.]+) [\d.-]+l5 5', svg) == [near(0.024)]
    assert "Dropping attention layers costs little" in svg
    assert "dashed: the bar, 0.06; diamond: the paper, 0.024" in svg


def test_a_row_for_each_subject_and_seed(claim: Claim, verdict: Verdict) -> None:
    other = dataclasses.replace(verdict, seed=1, subject="gemma3-270m", status="no test")
    svg = forest.svg(claim, [verdict, other])
    for words in ("a made-up model, seed 0", "gemma3-270m, seed 1", ">reproduced<", ">no test<"):
        assert words in svg
    assert len(number(r'd="M([\d.]+) [\d.]+a4 4', svg)) == 2
    assert svg == forest.svg(claim, [verdict, other])


def test_a_null_far_away_is_at_the_edge_with_its_number(claim: Claim, verdict: Verdict) -> None:
    far = dataclasses.replace(verdict, null={"random": 89.9}, draws={})
    svg = forest.svg(claim, [far])
    assert "null 89.9" in svg
    [dot] = number(r'd="M([\d.]+) [\d.]+a4 4', svg)
    assert dot + 4 == pytest.approx(at(svg, 0.02), abs=0.6)
    assert "null 89.9" not in forest.svg(claim, [verdict])


def test_a_null_of_another_number_is_not_drawn(claim: Claim, verdict: Verdict) -> None:
    apart = dataclasses.replace(claim, expect="attention <= 0.06 and mlp > random")
    assert 'height="16.0"' not in forest.svg(apart, [verdict])
    assert "grey" not in forest.svg(apart, [verdict])


def test_what_was_not_measured_has_no_picture(claim: Claim, verdict: Verdict) -> None:
    assert forest.svg(claim, []) == ""
    gone = dataclasses.replace(verdict, values={"mlp": 1.0}, interval={})
    assert forest.svg(claim, [gone]) == ""
    assert forest.shown(dataclasses.replace(claim, expect="random < attention")) == "attention"
