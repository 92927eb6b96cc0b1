"""Confirmatory is what was registered in an older commit; all else is exploratory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope import cli
from stratoscope.claims import Verdict, register, verdicts
from stratoscope.claims import paper as papers
from stratoscope.claims.paper import Paper, read
from stratoscope.claims.run import run

Git = Callable[..., str]


@pytest.fixture
def git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """A checkout in which the tests' papers are committed, where the package's are."""
    root = folder.parent / "checkout"
    shelf = root / "src" / "stratoscope" / "papers"
    shelf.parent.mkdir(parents=True)
    shutil.move(folder, shelf)
    monkeypatch.setattr(papers, "FOLDER", shelf)
    (root / ".gitignore").write_text("__pycache__/\n")

    def run_git(*words: str) -> str:
        named = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        done = subprocess.run(named, cwd=root, check=True, capture_output=True, text=True)
        return done.stdout

    run_git("init", "-q", "-b", "main")
    commit(run_git)
    return run_git


def commit(git: Git) -> None:
    git("add", "-A")
    git("commit", "-qm", "so far")


def paper() -> Paper:
    return read(papers.FOLDER / "llm_drop.py")


def measure(seed: int = 0) -> Verdict:
    return run(paper(), paper().named("attention_goes_first")[0], seed)


def registered(*, seeds: str = "0-2") -> None:
    words = ["claim", "llm-drop", "--register", "--seeds", seeds]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, done.stderr
    assert "Commit that file, then measure." in " ".join(done.output.split())


def test_what_is_written_down(git: Git) -> None:
    registered()
    [line] = (papers.FOLDER / "registrations" / "llm-drop.jsonl").read_text().splitlines()
    said = json.loads(line)
    assert said["expect"] == "attention <= 0.5 * mlp and attention < random"
    assert (said["seeds"], said["n"], said["valid"]) == ([0, 1, 2], "40 texts", "")
    assert len(said["digest"]) == 12


def test_registered_in_an_older_commit(git: Git) -> None:
    assert measure().registered == ""
    registered()
    assert measure().registered == ""  # not committed yet
    commit(git)
    found = measure(seed=1)
    assert len(found.registered) == 12
    assert measure(seed=5).registered == ""  # a seed that was not registered


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("0.5 * mlp", "5 * mlp", False),
        ("n=40,", "n=41,", False),  # the body
        ('n="40 texts"', 'n="4 texts"', False),
        ("as many layers, drawn at random", "a few layers", False),
        ("More words, of any kind.", "Other words.", True),
    ],
)
def test_what_was_changed_since_is_exploratory(git: Git, old: str, new: str, kept: bool) -> None:
    registered()
    file = papers.FOLDER / "llm_drop.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert measure().registered == ""  # the source differs from the commit
    commit(git)
    assert bool(measure().registered) is kept


def test_a_seed_that_is_known_cannot_be_registered(git: Git) -> None:
    """Also where the words were others then: who has seen a result does not foretell it."""
    old = dataclasses.replace(measure(), expect="attention < mlp")
    verdicts.append(old, [papers.FOLDER / "verdicts"])
    registered()
    [line] = (papers.FOLDER / "registrations" / "llm-drop.jsonl").read_text().splitlines()
    assert json.loads(line)["seeds"] == [1, 2]
    done = CliRunner().invoke(cli.main, ["claim", "llm-drop", "--register", "--seeds", "0"])
    assert done.exit_code == 2
    assert "what is known cannot be registered" in " ".join(done.stderr.split())


def test_a_source_that_differs_from_the_commit_is_exploratory(git: Git) -> None:
    """The claim is as it was registered, and what it calls is not what was committed."""
    registered()
    commit(git)
    (papers.FOLDER.parent / "engine.py").write_text("changed = 1")
    assert measure().registered == ""
    commit(git)
    assert measure().registered


def test_verdicts_beside_it_are_no_change_of_the_source(git: Git) -> None:
    registered()
    commit(git)
    verdicts.append(measure(), [papers.FOLDER / "verdicts"])
    assert measure(seed=1).registered


def test_git_is_asked_whether_it_is_true(git: Git) -> None:
    honest = dataclasses.replace(measure(), seed=2)
    registered()
    commit(git)
    good = measure()
    kept = papers.FOLDER / "verdicts"
    assert register.unproven([honest, good], papers.FOLDER) == []
    verdicts.append(good, [kept])
    commit(git)
    assert register.unproven([good], papers.FOLDER) == []
    liar = dataclasses.replace(honest, registered="0123456789ab")
    [problem] = register.unproven([good, liar], papers.FOLDER)
    assert "attention_goes_first (seed 2, " in problem
    assert "no older commit" in problem


def test_registered_in_the_same_commit_is_too_late(git: Git) -> None:
    """Written down after it was measured, and committed with it."""
    registered()
    late = dataclasses.replace(measure(), registered=_promised())
    verdicts.append(late, [papers.FOLDER / "verdicts"])
    commit(git)
    assert len(register.unproven([late], papers.FOLDER)) == 1


def test_a_rebase_changes_nothing(git: Git) -> None:
    registered()
    commit(git)
    good = measure()
    verdicts.append(good, [papers.FOLDER / "verdicts"])
    commit(git)
    git("checkout", "-q", "-b", "other", "main~2")
    (papers.FOLDER / "another.txt").write_text("x")
    commit(git)
    git("rebase", "-q", "--onto", "other", "main~2", "main")
    assert good.commit not in git("log", "--format=%h")
    assert register.unproven([good], papers.FOLDER) == []


def _promised() -> str:
    return register.digest(paper(), paper().named("attention_goes_first")[0])
