"""A stale verdict stands where another seed, measured again by today's code, gave the same numbers;
and only there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from stratoscope.claims import due, ledger, verdicts
from stratoscope.claims.paper import read
from stratoscope.claims.run import run

CLAIM = "attention_goes_first"


def atlas(folder: Path) -> ledger.Atlas:
    return ledger.atlas(folder, [folder / "verdicts"])


def entry(folder: Path) -> ledger.Entry:
    return atlas(folder).find("llm-drop")


def measure(folder: Path, seed: int, date: str, old: bool = False, **changes: Any) -> None:
    """Keep a verdict on a seed; old: by code of which a module has changed since."""
    paper = read(folder / "llm_drop.py")
    made = run(paper, paper.named(CLAIM)[0], seed)
    if old:
        changes["code"] = {**made.code, "engine.sweep": "0" * 8, **changes.pop("code", {})}
    date = f"2026-01-{date}T00:00:00Z"
    verdicts.append(dataclasses.replace(made, date=date, **changes), [folder / "verdicts"])


def seeds_due(folder: Path) -> list[int]:
    pieces = due.due(atlas(folder), [0, 1, 2], stale=True, keys=["llm-drop"])
    return [piece.seed for piece in pieces if piece.claim.name == CLAIM]


def before(folder: Path, **changes: Any) -> None:
    for seed in (0, 1, 2):
        measure(folder, seed, "01", old=True, **changes)


def test_of_stale_seeds_the_first_alone_is_due_and_confirms_the_others(folder: Path) -> None:
    before(folder)
    assert list(entry(folder).stale()) == [CLAIM]
    assert seeds_due(folder) == [0]
    measure(folder, 0, "02")
    assert seeds_due(folder) == []
    assert entry(folder).stale() == {}
    assert entry(folder).confirmed() == {CLAIM: [1, 2]}
    # the word is still that of all three
    assert len(entry(folder).seeds(entry(folder).small[0])) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"values": "one moved"},
        {"units": {"each": (1.0,)}},
    ],
    ids=str,
)
def test_another_number_confirms_nothing(folder: Path, changed: dict[str, Any]) -> None:
    before(folder)
    if changed.get("values"):
        values = dict(entry(folder).verdicts[0].values)
        name = next(iter(values))
        changed = {"values": values | {name: values[name] * 1.002 + 1e-5}}
    measure(folder, 0, "02", **changed)
    assert 1 in seeds_due(folder)
    assert 2 in seeds_due(folder)
    assert entry(folder).confirmed() == {}


def test_a_claim_whose_own_body_changed_is_not_confirmed(folder: Path) -> None:
    before(folder, code={"claim": "0" * 8})
    measure(folder, 0, "02")
    assert seeds_due(folder) == [1, 2]


def test_a_seed_measured_by_yet_other_code_is_not_confirmed(folder: Path) -> None:
    before(folder)
    measure(folder, 2, "02", old=True, code={"engine.trace": "2" * 8})
    measure(folder, 0, "03")
    assert seeds_due(folder) == [2]
    assert entry(folder).confirmed() == {CLAIM: [1]}


def test_one_seed_confirms_nothing_of_itself(folder: Path) -> None:
    measure(folder, 0, "01", old=True)
    assert entry(folder).confirmed() == {}
    assert 0 in seeds_due(folder)


def test_a_second_run_by_code_that_has_changed_too_confirms_nothing(folder: Path) -> None:
    before(folder)
    measure(folder, 0, "02", old=True, code={"engine.trace": "1" * 8})
    assert seeds_due(folder) == [0]
    assert entry(folder).confirmed() == {}
