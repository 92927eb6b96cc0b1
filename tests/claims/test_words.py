"""The two words of a paper: one rule, which the pages, the command line and the README repeat."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope import cli
from stratoscope.claims import Claim, Verdict, ledger, pages, words
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.claims.words import Words

SMALL = {
    "where": "abstract",
    "read": "abstract",
    "tier": "small",
    "n": "2 texts",
    "expect": "a > b",
    "null": {"b": "chance"},
}


def cell(says: str, subject: str, word: str) -> words.Cell:
    kind = "miniature" if subject.startswith("tiny") else "real"
    name = f"{says}_{subject}".replace(" ", "_")
    return Claim(name=name, says=says, subject=subject, kind=kind, **SMALL), word


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([], Words("", "", 0, 0)),
        # a miniature does not rescue a real model
        (
            [cell("A", "tiny", "reproduced"), cell("A", "one", "not reproduced")],
            Words("not reproduced", "reproduced", 0, 1),
        ),
        # nor does a good model hide a bad one, or one statement another
        (
            [cell("A", "one", "reproduced"), cell("A", "two", "not reproduced")],
            Words("not reproduced", "", 1, 2),
        ),
        (
            [
                cell("A", "one", "reproduced"), cell("B", "one", "direction only"),
                cell("A", "two", "direction only"), cell("B", "two", "reproduced"),
            ],
            Words("direction only", "", 0, 2),
        ),
        # what could not be tested on one model is judged on the others
        (
            [cell("A", "one", "no test"), cell("A", "two", "reproduced")],
            Words("reproduced", "", 1, 1),
        ),
        ([cell("A", "one", "no test")], Words("no test", "", 0, 0)),
        (
            [cell("A", "one", "reproduced"), cell("B", "one", "no test")],
            Words("no test", "", 0, 1),
        ),
        # a failure is not hidden by what was not run, and what was not run by no success
        (
            [cell("A", "one", "reproduced"), cell("B", "one", "built, not run")],
            Words("built, not run", "", 0, 1),
        ),
        (
            [cell("A", "one", "reproduced"), cell("A", "two", "built, not run")],
            Words("built, not run", "", 1, 2),
        ),
        (
            [cell("A", "one", "not reproduced"), cell("B", "one", "built, not run")],
            Words("not reproduced", "", 0, 1),
        ),
        ([cell("A", "tiny", "direction only")], Words("", "direction only", 0, 0)),
    ],
)  # fmt: skip
def test_the_rule(cells: list[words.Cell], expected: Words) -> None:
    run = sum(word != words.NOT_RUN for _, word in cells)
    expected = expected._replace(run=run, claims=len(cells))
    assert words.words(cells) == expected
    assert words.words(cells[::-1]) == expected


def test_one_word_to_count_papers_by() -> None:
    assert Words("no test", "reproduced", 0, 0).status == "no test"
    assert Words("", "reproduced", 0, 0).status == "mechanism only"
    assert Words("", "built, not run", 0, 0).status == "built, not run"
    told = Words("direction only", "reproduced", 1, 2)
    assert told.summary == "direction only (1 of 2 models); mechanism: reproduced"
    assert words.sentence(told) == (
        "On real models: direction only; 1 of 2 models reproduces every statement. In "
        "miniatures: reproduced."
    )
    assert words.sentence(Words("", "", 0, 0)) == "Nothing was measured."


@pytest.mark.parametrize(("run", "in_part"), [(0, False), (3, True), (14, False)])
def test_a_paper_that_has_run_in_part_says_how_far(run: int, in_part: bool) -> None:
    of = Words("built, not run", "", 0, 2, run, 14)
    assert (f"{run} of 14 claims have run" in of.summary) == in_part
    assert (f"So far {run} of 14 claims have run" in words.sentence(of)) == in_part


def test_everyone_says_the_same_rule() -> None:
    flat = lambda text: " ".join(text.split())  # noqa: E731
    texts = pages.texts(pages.own())
    assert words.RULE in flat(texts[Path("docs/papers/README.md")])
    assert words.RULE in flat(texts[Path("README.md")])
    assert words.RULE in flat(CliRunner().invoke(cli.main, ["papers", "--help"]).output)


# an entry of the ledger ---------------------------------------------------------------------------


def entry(folder: Path, *verdicts: Verdict) -> ledger.Entry:
    return ledger.Entry(ledger.rows()["llm-drop"], read(folder / "llm_drop.py"), verdicts)


@pytest.fixture
def good(folder: Path) -> Verdict:
    paper = read(folder / "llm_drop.py")
    return run(paper, paper.named("attention_goes_first")[0])


def later(verdict: Verdict, **changes: object) -> Verdict:
    return dataclasses.replace(verdict, date="2099-01-01T00:00:00Z", **changes)


def test_the_worst_seed_counts(folder: Path, good: Verdict) -> None:
    bad = dataclasses.replace(good, status="not reproduced", seed=1)
    assert entry(folder).status == "built, not run"
    assert entry(folder, good).status == "reproduced"
    assert {entry(folder, good, bad).status, entry(folder, bad, good).status} == {"not reproduced"}


def test_a_rerun_on_the_same_seed_hides_no_failure(folder: Path, good: Verdict) -> None:
    """It did: of two runs of the same code the newer one counted, and the page was silent."""
    bad = dataclasses.replace(good, status="not reproduced")
    again = entry(folder, bad, later(good))
    assert again.status == "not reproduced"
    [(lost, why)] = again.superseded()
    assert lost.status == "reproduced"
    assert why == "run twice on seed 0 by the same code: the worse one counts"


def test_mended_code_counts_and_the_failure_stays_listed(folder: Path, good: Verdict) -> None:
    bad = dataclasses.replace(good, status="not reproduced", code={"layers.other": "12345678"})
    again = entry(folder, bad, later(good))
    assert again.status == "reproduced"
    [(lost, why)] = again.superseded()
    assert lost == bad
    assert why == "measured again on seed 0 on 2099-01-01, by other code"


def test_verdicts_that_do_not_say_by_what_code_hide_no_failure(folder: Path, good: Verdict) -> None:
    """As on concept-vectors and function-tokens, whose old verdicts kept no digests."""
    bad = dataclasses.replace(good, status="not reproduced", code={})
    assert entry(folder, bad, later(good, code={})).status == "not reproduced"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"expect": "attention < 9"}, "the words changed after the measurement: expect was"),
        ({"direction": ""}, "direction was not asked"),
        ({"valid": "mlp > 0"}, "valid was `mlp > 0`"),
        ({"we_expect": "mlp > 0"}, "we_expect was `mlp > 0`"),
        ({"wanted": "2 texts"}, "n was 2 texts"),
        ({"subject": "x"}, "about another subject now than x"),
        ({"claim": "gone"}, "no longer in the file"),
    ],
)
def test_a_verdict_about_other_words_does_not_count(
    folder: Path, good: Verdict, change: dict[str, str], why: str
) -> None:
    other = dataclasses.replace(good, **change)
    assert entry(folder, other).status == "built, not run"
    [(lost, said)] = entry(folder, other).superseded()
    assert lost == other
    assert why in said
    assert entry(folder, good, other).status == "reproduced"


def test_an_identity_verdict_is_not_a_papers_word(folder: Path) -> None:
    paper = read(folder / "llm_drop.py")
    assert entry(folder, run(paper, paper.named(tier="identity")[0])).status == "built, not run"


def test_five_marks_with_their_reasons(folder: Path, good: Verdict) -> None:
    one = entry(folder, good)
    marks = words.marks(one.small, one.seeds(one.small[0]))
    assert list(marks) == ["faithful", "central", "severe", "powered", "general"]
    assert [good for good, _ in marks.values()] == [False, True, True, False, False]
    assert marks["powered"][1] == "0 of 1 claim judged by a bound; 1 seed"
