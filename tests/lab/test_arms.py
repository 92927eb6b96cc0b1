"""The protocol of comparisons, on a weight that Adam moves by the learning rate each step: which
rate is best is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stratoscope.engine.train import Recipe
from stratoscope.errors import InputError, ResultError
from stratoscope.lab import arms

CENTRE, STEPS = 0.03, 160
BUILT: list[tuple[str, int, float, int]] = []


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    BUILT.clear()


class Walker(nn.Module):
    """It starts at 0 and is to reach `goal`."""

    def __init__(self, goal: float, width: int = 1) -> None:
        super().__init__()
        self.at, self.goal = nn.Parameter(torch.zeros(width)), goal
        self.spread = nn.Parameter(torch.randn(2, 3))  # so that seeds differ

    def forward(self) -> torch.Tensor:
        return (self.at - self.goal).abs().mean() + 0 * (self.spread @ self.spread.T).sum()


def arm(name: str, goal: float, *, width: int = 1, tokens: int = 4) -> arms.Arm:
    """The best of the three rates is the one that walks `goal` in an eighth of the steps."""

    def recipe(seed: int, rate: float, steps: int) -> Recipe:
        BUILT.append((name, seed, rate, steps))
        model = Walker(goal, width)

        def save(model: nn.Module, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "at.json").write_text(json.dumps(model.at.tolist()))

        return Recipe(
            model,
            lambda model, step, generator: model(),
            save,
            lambda model: {"loss": model().item()},
            steps=steps,
            rate=rate,
            warmup=0,
            floor=1.0,
            decay=0.0,
        )

    def units(model: nn.Module) -> dict[str, torch.Tensor]:
        return {"spread": model.spread.flatten()}

    return arms.Arm(name, recipe, lambda m: float(m()), units, CENTRE, STEPS, tokens)


def walk(factor: float) -> float:
    return factor * CENTRE * (STEPS // 8)


def test_each_arm_gets_the_rate_that_is_best_for_it(tmp_path: Path) -> None:
    """A third, one and three times the centre: all three are found, on seed 100, in an eighth."""
    three = [arm("slow", walk(1 / 3)), arm("middle", walk(1)), arm("fast", walk(3))]
    found = arms.compare("walk", three, version=1, records=tmp_path / "r", seeds=(0, 1))
    rates = {name: ended[0].card["rate"] / CENTRE for name, ended in found.items()}
    assert rates == pytest.approx({"slow": 1 / 3, "middle": 1.0, "fast": 3.0})
    tries = {(name, rate, steps) for name, seed, rate, steps in BUILT if seed == 100}
    for name in rates:
        searched = sorted(rate for n, rate, steps in tries if n == name and steps == STEPS // 8)
        assert searched == pytest.approx([CENTRE / 3, CENTRE, 3 * CENTRE])
    runs = [(name, seed) for name, seed, _, steps in BUILT if seed != 100]
    assert sorted(runs) == sorted((name, seed) for name in rates for seed in (0, 1))
    assert all(steps == STEPS for _, seed, _, steps in BUILT if seed != 100)
    search = json.loads((tmp_path / "r" / "fast-rate.json").read_text())
    assert search["at_the_edge"]
    assert list(search["validation"].values()) == sorted(search["validation"].values())[::-1]


def test_no_arm_is_trained_twice(tmp_path: Path) -> None:
    """Numbers of units and cards come from the records; a new seed trains that seed alone."""
    two = [arm("a", walk(1)), arm("b", walk(1))]
    records = tmp_path / "r"
    assert len(arms.missing("walk", two, version=1, records=records, seeds=(0,))) == 2
    first = arms.compare("walk", two, version=1, records=records, seeds=(0,))
    BUILT.clear()
    again = arms.compare("walk", two, version=1, records=records, seeds=(0,))
    assert BUILT == []
    assert torch.equal(first["a"][0].units["spread"], again["a"][0].units["spread"])
    assert first["a"][0].card == json.loads(json.dumps(again["a"][0].card))
    assert again["a"][0].folder is not None
    assert arms.missing("walk", two, version=1, records=records, seeds=(0, 2)) == [
        ("a", 2),
        ("b", 2),
    ]
    more = arms.compare("walk", two, version=1, records=records, seeds=(0, 2))
    assert {(seed, steps) for _, seed, _, steps in BUILT} == {(2, STEPS)}
    assert not torch.equal(more["a"][0].units["spread"], more["a"][2].units["spread"])
    # equal seeds, equal weights
    assert torch.equal(more["a"][2].units["spread"], more["b"][2].units["spread"])
    with pytest.raises(ResultError, match="another version"):
        arms.compare("walk", two, version=2, records=records, seeds=(0,))
    changed = [replace(two[0], settings={"goal": 2}), two[1]]
    with pytest.raises(ResultError, match="other settings"):
        arms.compare("walk", changed, version=1, records=records, seeds=(0,))


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    def stop(done: int, steps: int, words: str) -> None:
        if steps == STEPS and done > STEPS // 2:
            raise KeyboardInterrupt

    two = [arm("a", walk(1)), arm("b", walk(1))]
    options = {"version": 1, "records": tmp_path / "r", "seeds": (0,)}
    with pytest.raises(KeyboardInterrupt):
        arms.compare("walk", two, progress=stop, **options)
    BUILT.clear()
    arms.compare("walk", two, **options)
    assert ("a", 100) not in {(name, seed) for name, seed, *_ in BUILT}  # its search was kept


def test_unequal_arms_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    options = {"version": 1, "records": tmp_path / "r"}
    with pytest.raises(InputError, match=r"equal tokens: b has 800, a has 640"):
        arms.compare("walk", [arm("a", 1.0), arm("b", 1.0, tokens=5)], **options)
    with pytest.raises(InputError, match=r"equal parameters: b has 9, a has 7"):
        arms.compare("walk", [arm("a", 1.0), arm("b", 1.0, width=3)], **options)
    with pytest.raises(InputError, match="100 is the search's"):
        arms.compare("walk", [arm("a", 1.0)], seeds=(100,), **options)
    with pytest.raises(InputError, match="each arm needs a name"):
        arms.compare("walk", [arm("a", 1.0), arm("a", 2.0)], **options)
    assert {steps for *_, steps in BUILT} == {STEPS}  # built to be counted, at full length
    assert not (tmp_path / "r").exists()


def test_operations_may_be_equal_where_parameters_are_not(tmp_path: Path) -> None:
    two = [arm("a", walk(1)), arm("b", walk(1), width=3)]
    found = arms.compare("walk", two, version=1, records=tmp_path / "r", seeds=(0,), equal="flops")
    costs = [ended[0].card["cost"] for ended in found.values()]
    # spread @ spread.T is 2 * 2 * 2 * 3 operations, its two gradients as many each
    assert [cost["flops"] for cost in costs] == [3 * 24 * STEPS] * 2
    assert [cost["parameters"] for cost in costs] == [7, 9]


def test_what_diverges_or_takes_too_long(tmp_path: Path) -> None:
    sick = replace(arm("sick", walk(1)), centre=1e39)
    with pytest.raises(InputError, match="trains at none of the rates"):
        arms.compare("walk", [sick], version=1, records=tmp_path / "s", seeds=(0,))
    with pytest.raises(InputError, match=r"CPU-seconds a seed; an arm may take 0"):
        arms.compare(
            "walk", [arm("a", walk(1))], version=1, records=tmp_path / "l", seeds=(0,), limit=0.0
        )
