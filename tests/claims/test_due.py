"""What is due, in what order, and how a budget is spent; a second run goes on where the first
stopped."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope import cli
from stratoscope.claims import due, ledger, verdicts
from stratoscope.claims.due import Due
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.cli import _apart
from stratoscope.errors import ClaimError


def atlas(folder: Path) -> ledger.Atlas:
    return ledger.atlas(folder, [folder / "verdicts"])


def measure(folder: Path, seed: int, **changes: object) -> None:
    paper = read(folder / "llm_drop.py")
    made = run(paper, paper.named("attention_goes_first")[0], seed)
    verdicts.append(dataclasses.replace(made, **changes), [folder / "verdicts"])


def names(pieces: list[Due]) -> list[tuple[str, int]]:
    return [(piece.claim.name, piece.seed) for piece in pieces]


def test_what_never_ran_is_due_on_every_seed(folder: Path) -> None:
    found = due.due(atlas(folder), [0, 1], stale=False)
    assert sorted(names(found)) == [
        (n, s) for n in ("attention_goes_first", "it_is_so") for s in (0, 1)
    ]
    assert {piece.why for piece in found} == {"not run"}


def test_what_was_timed_comes_first(folder: Path) -> None:
    measure(folder, 0, seconds=30.0)
    found = due.due(atlas(folder), [0, 1], stale=False)
    assert names(found) == [("attention_goes_first", 1), ("it_is_so", 0), ("it_is_so", 1)]
    assert found[0].seconds == 30.0


def test_a_stale_verdict_is_due_when_asked_for(folder: Path) -> None:
    measure(folder, 0, code={})
    assert names(due.due(atlas(folder), [0], stale=False, keys=["llm-drop"])) == []
    [piece] = due.due(atlas(folder), [0], stale=True, keys=["llm-drop"])
    assert piece.why == "it was kept before verdicts recorded their code"


def test_an_unknown_key_is_refused(folder: Path) -> None:
    with pytest.raises(ClaimError, match="Nearest: llm-drop"):
        due.due(atlas(folder), [0], stale=False, keys=["llm-dorp"])


def test_the_budget_is_kept_and_the_rest_goes_on_next_time(folder: Path) -> None:
    measure(folder, 0, seconds=40.0)
    pieces = due.due(atlas(folder), [0, 1, 2, 3], stale=False, keys=["llm-drop"])
    now = 0.0

    def take(piece: Due) -> int:
        nonlocal now
        now += 40.0
        if piece.seed == 1:
            return 1  # it broke
        measure(folder, piece.seed, seconds=40.0)
        return 0

    became = [(piece.seed, word) for piece, word in due.work(pieces, 100.0, take, lambda: now)]
    assert became == [(1, "failed"), (2, "measured"), (3, "left")]
    assert names(due.due(atlas(folder), [0, 1, 2, 3], stale=False, keys=["llm-drop"])) == [
        ("attention_goes_first", 1),
        ("attention_goes_first", 3),
    ]


def test_what_was_never_timed_waits_too_once_the_budget_is_used(folder: Path) -> None:
    pieces = due.due(atlas(folder), [0, 1, 2], stale=False, keys=["llm-drop"])[:3]
    assert all(math.isnan(piece.seconds) for piece in pieces)
    clock = iter([0.0, 0.0, 60.0, 120.0])  # at the start, and before each piece
    became = [word for _, word in due.work(pieces, 100.0, lambda piece: 0, lambda: next(clock))]
    assert became == ["measured", "measured", "left"]


def test_a_piece_runs_apart_and_its_status_comes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A crash costs one piece, and no module that one loads is loaded here."""
    [piece, *_] = due.due(atlas(folder), [0], stale=False)
    words = ["claim", piece.entry.row.key, "--claim", piece.claim.name]
    assert piece.arguments == [*words, "--subject", piece.claim.subject, "--seed", "0"]
    monkeypatch.setattr(_apart, "_LIBRARIES", [])
    before = set(sys.modules)
    assert _apart.run(["papers", "--help"]) == 0
    assert _apart.run(["claim", "nobody-wrote-this"]) == 2
    shown = capfd.readouterr()
    assert "what became of each" in shown.out
    assert "nobody-wrote-this" in shown.err
    assert not {m for m in set(sys.modules) - before if m.startswith("stratoscope.cli.")}


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", [0, 1, 2]), ("3", [3]), ("0,1,5", [0, 1, 5]), ("0-1,7", [0, 1, 7])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert due.read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "2-0", "a", "0-", "-1", "0;1"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(ClaimError, match="seeds"):
        due.read_seeds(text)


def test_budgets() -> None:
    assert [due.read_budget(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    with pytest.raises(ClaimError, match=r"write 90s, 30m or 2h"):
        due.read_budget("30")


def test_on_the_command_line(folder: Path) -> None:
    """The claims run in processes of their own, which see this package's papers: here only the list
    is tried."""
    listed = CliRunner().invoke(cli.main, ["claim", "--all", "--seeds", "0-1", "--dry-run"])
    assert listed.exit_code == 0, listed.stderr
    assert "4 measurements are due" in listed.output
    assert "  lazy-neuron it_is_so on smollm2, seed 1: not run" in listed.output
    bare = CliRunner().invoke(cli.main, ["claim"])
    assert bare.exit_code == 2
    assert "give --all" in bare.stderr
    measure(folder, 0, code={})
    stale = CliRunner().invoke(cli.main, ["papers", "--stale"])
    assert stale.exit_code == 0, stale.stderr
    assert "llm-drop" in stale.output
    assert "1 papers are stale" in stale.output
