"""A verdict is stale when what it was measured with computes something else now, and for no other
reason."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from stratoscope import catalogue
from stratoscope.claims import Verdict, code, ledger, pages, verdicts
from stratoscope.claims.paper import read
from stratoscope.claims.run import run

MODULE = '''"""A method."""

import math


def score(x):
    """Half of x."""
    # halved
    return math.floor(x / 2)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for this package, with one module."""
    made = tmp_path / "package"
    (made / "layers").mkdir(parents=True)
    (made / "layers" / "score.py").write_text(MODULE)
    monkeypatch.setattr(catalogue, "ROOT", made)
    code._of_file.cache_clear()
    return made


@pytest.fixture
def verdict(folder: Path, package: Path) -> Verdict:
    paper = read(folder / "llm_drop.py")
    made = run(paper, paper.named("attention_goes_first")[0])
    own = {code.CLAIM: made.code[code.CLAIM], "layers.score": code.of_module("layers.score")}
    return dataclasses.replace(made, code=own)


def reasons(verdict: Verdict, folder: Path) -> list[str]:
    code._of_file.cache_clear()
    return code.changed(verdict, folder / "llm_drop.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A method."""', '"""Another word for it."""'),
        ('    """Half of x."""\n', ""),
        ("    # halved\n", ""),
        ("return math.floor(x / 2)", "return math.floor(\n        x\n        / 2\n    )"),
    ],
)
def test_words_and_layout_change_nothing(
    verdict: Verdict, folder: Path, package: Path, old: str, new: str
) -> None:
    assert old in MODULE
    (package / "layers" / "score.py").write_text(MODULE.replace(old, new))
    assert reasons(verdict, folder) == []


def test_a_change_of_what_is_computed_is_told(
    verdict: Verdict, folder: Path, package: Path
) -> None:
    (package / "layers" / "score.py").write_text(MODULE.replace("x / 2", "x / 3"))
    assert reasons(verdict, folder) == ["layers.score changed"]
    (package / "layers" / "score.py").unlink()
    assert reasons(verdict, folder) == ["layers.score changed"]


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("0.41, 0.11]", "0.42, 0.11]", True),  # the claim's own body
        ('values={"cost": 0.0}', 'values={"cost": 0.1}', False),  # another claim's
        # words that are judged apart
        ('says="Dropping attention', 'says="Leaving out attention', False),
        # what it may call
        ("import Measured, claim\n", "import Measured, claim\n\nSCALE = 2\n", True),
        ("More words, of any kind.", "Other words.", False),
    ],
)
def test_of_its_paper_file_a_verdict_keeps_its_own_claim(
    verdict: Verdict, folder: Path, old: str, new: str, stale: bool
) -> None:
    file = folder / "llm_drop.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert reasons(verdict, folder) == (["the claim attention_goes_first changed"] if stale else [])


def test_a_library_older_than_what_is_asked_for(verdict: Verdict, folder: Path) -> None:
    assert set(code.floors()) == {"torch", "transformers"}
    old = dataclasses.replace(verdict, versions={**verdict.versions, "transformers": "5.1.0"})
    assert reasons(old, folder) == [
        f"transformers was 5.1.0, and {code.floors()['transformers']} is needed now"
    ]
    new = dataclasses.replace(verdict, versions={"torch": "2.99.1+cpu", "transformers": "6.0"})
    assert reasons(new, folder) == []
    # the oldest that is asked for
    assert reasons(dataclasses.replace(verdict, versions=code.floors()), folder) == []


def test_a_verdict_from_before_is_stale(verdict: Verdict, folder: Path) -> None:
    assert reasons(dataclasses.replace(verdict, code={}), folder) == [
        "it was kept before verdicts recorded their code"
    ]


def test_a_run_records_the_modules_that_compute() -> None:
    import stratoscope.engine.sweep  # noqa: F401

    found = code.loaded()
    assert {"engine.sweep", "engine.packed", "models.lm"} <= found.keys()
    assert not [
        name for name in found if name.split(".")[0] in ("claims", "cli", "plots", "papers")
    ]
    assert all(len(digest) == 8 for digest in found.values())


def test_a_broken_method_makes_its_pages_stale(
    verdict: Verdict, folder: Path, package: Path, tmp_path: Path
) -> None:
    """The word stays, and the mark beside it appears."""
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    verdicts.append(verdict, [folder / "verdicts"])
    atlas = ledger.atlas(folder, [folder / "verdicts"])
    pages.write(atlas, root)
    assert pages.stale(atlas, root) == []
    (package / "layers" / "score.py").write_text(MODULE.replace("x / 2", "x / 3"))
    code._of_file.cache_clear()
    assert "docs/papers/llm-drop.md is not up to date" in pages.stale(atlas, root)
    pages.write(atlas, root)
    page = (root / "docs/papers/llm-drop.md").read_text()
    assert (
        "**On real models: reproduced; 1 of 1 models reproduces every statement.** *Stale.*" in page
    )
    assert (
        f"| reproduced, 1 of 1 |  | {verdict.date[:10]}, *stale* |"
        in (root / "docs/papers/README.md").read_text()
    )


def test_commit_and_machine_are_kept(verdict: Verdict) -> None:
    assert "Python 3" in verdict.machine
    assert torch.backends.cpu.get_cpu_capability() in verdict.machine
    assert re.search(r"\b\d+ threads?\b", verdict.machine)
    assert verdict.commit == ""  # the made-up package is no checkout
