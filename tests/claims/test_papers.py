"""Paper files are read by their text; the real ones keep the form, point at what exists, and their
identities hold."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from stratoscope import catalogue
from stratoscope.claims import due, ledger, verdicts
from stratoscope.claims import paper as papers
from stratoscope.claims.paper import read, shelf
from stratoscope.claims.run import functions, run
from stratoscope.errors import ClaimError
from stratoscope.store import pretrained

BUILT, BROKEN = shelf()
IDENTITIES = [
    (paper, claim) for paper in BUILT.values() for claim in paper.claims if claim.tier == "identity"
]
METHODS = {entry.address: entry for entry in catalogue.methods()}


def test_a_file_is_read_without_being_run(folder: Path) -> None:
    (folder / "lazy_neuron.py").write_text(
        (folder / "lazy_neuron.py").read_text() + "\nraise RuntimeError('imported')\n"
    )
    found, broken = shelf(folder)
    assert broken == {}
    paper = found["llm-drop"]
    assert paper.title == "What Matters in Transformers? Not All Attention is Needed"
    assert (paper.authors, paper.year, paper.arxiv) == ("He, Sun, Shen and Li", 2024, "2406.15786")
    assert paper.claim == "half of the attention layers can go at little cost, unlike MLPs."
    assert paper.methods == ("layers.logit_lens", "heads.roles")
    assert [claim.name for claim in paper.claims] == [
        "attention_goes_first",
        "nothing_costs_nothing",
    ]
    assert paper.claims[0].expect == "attention <= 0.5 * mlp and attention < random"
    assert {name: f.claims for name, f in functions(paper).items()} == {
        claim.name: (claim,) for claim in paper.claims
    }
    assert (
        paper.protocol == "Llama-2-13B, half of its attention layers, on the authors' benchmarks."
    )
    assert found["lazy-neuron"].arxiv == ""
    assert paper.unsaid == [papers.MIND, papers.OBJECT]


def test_what_is_not_written_is_listed_and_what_is_is_read(folder: Path) -> None:
    file = folder / "lazy_neuron.py"
    said = "What would change our mind: a model with\n    dense neurons.\n"
    said += "What the authors may object: size.\n"
    file.write_text(file.read_text().replace("Methods:", f"{said}Methods:"))
    paper = shelf(folder)[0]["lazy-neuron"]
    assert paper.would_change == "a model with dense neurons."
    assert paper.may_object == "size."
    assert paper.unsaid == ["Protocol"]


def test_a_file_across_papers_is_no_row_of_the_ledger(folder: Path) -> None:
    """Its claims are found, listed, measured and kept like those of a paper."""
    text = (folder / "lazy_neuron.py").read_text().replace("A. Uthor, 2023.", "Ours, 2026.")
    text = text.replace("Methods:", "Across: llm-drop, lazy-neuron\nMethods:")
    (folder / "two_together.py").write_text(text)
    atlas = ledger.atlas(folder, [])
    assert atlas.problems == []
    assert (len(atlas.entries), list(atlas.across)) == (243, ["two-together"])
    entry = atlas.find("two-together")
    assert entry.paper
    assert entry.paper.across == ("llm-drop", "lazy-neuron")
    assert [e.row.key for e in atlas.built()] == ["lazy-neuron", "llm-drop", "two-together"]
    assert "two-together" in {piece.entry.row.key for piece in due.due(atlas, [0], stale=False)}
    (folder / "two_together.py").write_text(text.replace("llm-drop,", "llm-dorp,"))
    [problem] = ledger.atlas(folder, []).problems
    assert "two_together.py runs across llm-dorp, which is no paper of the ledger. Nea" in problem


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("Claim:", "Claims"), "no line `Claim: ...`"),
        (("Methods:", "Method:"), "no line `Methods: ...`"),
        (
            ("def it_is_so(lm, seed", "def it_is_so(seed"),
            "takes (seed); with subjects it takes (lm, ",
        ),
        (
            ('subjects=("smollm2",)', 'subject="smollm2"'),
            "with a subject of its own it takes (seed)",
        ),
        (('n="3 texts"', 'n="texts"'), "say how many independent units"),
        (('n="3 texts"', 'n="0 texts"'), "say how many independent units"),
        (('read="abstract"', 'read="all of it"'), "say how much was read"),
        (("2023", "MM"), "a year in the line under its title"),
        (('expect="a > b"', 'expect="a !"'), "cannot be read as a comparison"),
        (('expect="a > b"', "expect=EXPECT"), "must be plain text"),
        (('    expect="a > b",\n', ""), "'expect'"),
        (('"the same, shuffled"', '" "'), "a null without words"),
        (('tier="small"', 'tier="big"'), "the tiers are"),
        (("@claim(", "dict("), "a function marked with"),
        (("def it_is_so(", "def it_is_so(("), "cannot be read as a paper"),
        (("Another", "\0"), "cannot be read as a paper"),
    ],
)
def test_a_broken_file_is_named_and_hides_no_other(
    folder: Path, change: tuple[str, str], reason: str
) -> None:
    file = folder / "lazy_neuron.py"
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change))
    found, broken = shelf(folder)
    assert list(found) == ["llm-drop"]
    assert broken["lazy_neuron.py"].startswith("lazy_neuron.py cannot be read as a paper:")
    assert reason in broken["lazy_neuron.py"]
    atlas = ledger.atlas(folder, [])
    assert atlas.problems == [broken["lazy_neuron.py"]]
    assert (atlas.find("lazy-neuron").status, atlas.find("llm-drop").status) == (
        "not built",
        "built, not run",
    )


def test_a_file_that_runs_otherwise_than_it_reads(folder: Path) -> None:
    file = folder / "llm_drop.py"
    file.write_text(
        file.read_text() + "\n\nattention_goes_first.claims = nothing_costs_nothing.claims\n"
    )
    with pytest.raises(ClaimError, match="says one thing"):
        run(read(file), read(file).claims[0])


def test_a_claim_that_gives_something_else(folder: Path) -> None:
    file = folder / "llm_drop.py"
    file.write_text(file.read_text().replace("return Measured(values", "return dict(values"))
    with pytest.raises(ClaimError, match=r"gave dict; it must give Measured"):
        run(read(file), read(file).named(tier="identity")[0])


def test_the_ledger() -> None:
    rows = ledger.rows()
    assert len(rows) == 243
    assert all(
        re.fullmatch(r"[a-z0-9-]+", key) and row.title and 1980 < row.year < 2030
        for key, row in rows.items()
    )
    atlas = ledger.atlas(folders=[])
    assert sum(atlas.counts().values()) == 243
    for asked, near in (("llm-dorp", "llm-drop"), ("Lazy Neuron", "lazy-neuron")):
        with pytest.raises(
            ClaimError, match=f"There is no paper '{asked}' among 243. Nearest: .*{near}"
        ):
            atlas.find(asked)
    with pytest.raises(ClaimError, match="lists them all"):
        atlas.find("#%!")


def test_reading_loads_no_torch_and_no_paper() -> None:
    import subprocess

    program = (
        "from stratoscope.claims import ledger\nledger.atlas()\nimport sys\n"
        "print(*[n for n in sys.modules if n.startswith(('torch', 'stratoscope.papers.', 'xarray', "
        "'plotly'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# the real ones ------------------------------------------------------------------------------------


def test_every_paper_file_can_be_read() -> None:
    assert BROKEN == {}


def test_every_line_of_the_verdict_file_can_be_read() -> None:
    found, problems = verdicts.read([verdicts.home()])
    assert problems == []
    across = {key for key, paper in BUILT.items() if paper.across}
    assert {verdict.key for verdict in found} <= ledger.rows().keys() | across


@pytest.mark.parametrize("key", BUILT)
def test_a_paper_points_at_what_exists_and_can_fail(key: str) -> None:
    paper = BUILT[key]
    row = ledger.rows().get(key)
    if paper.across:
        assert row is None, f"{key} is a paper of the ledger, and not ours"
        assert [name for name in paper.across if name not in BUILT] == []
    else:
        assert row, f"{paper.path.name} is no paper of the ledger"
        assert _letters(paper.title) == _letters(row.title)
    assert [address for address in paper.methods if address not in METHODS] == []
    assert {"identity", "small"} <= {claim.tier for claim in paper.claims}
    for claim in paper.claims:  # its other words are checked by Claim
        assert claim.about, f"{key}: {claim.name} does not say how it is measured"
    assert paper.protocol, f"{key} has no line `Protocol: ...` for the paper's own models"
    central = [claim for claim in paper.claims if claim.tier == "small" and not claim.side]
    assert central, f"{key} has side shows only"
    for claim in paper.claims:
        if claim.any_model:
            assert claim.subject in pretrained.NAMED, f"{claim.name}: no model {claim.subject!r}"
        small = claim.subject.startswith(("tiny", "a tiny")) or "trained on" in claim.subject
        assert not (small and claim.kind == "real"), f"{claim.name} calls a miniature real"


@pytest.mark.parametrize(
    ("paper", "claim"), IDENTITIES, ids=lambda x: getattr(x, "key", getattr(x, "name", ""))
)
def test_an_identity_holds(paper: papers.Paper, claim: ledger.Claim) -> None:
    verdict = run(paper, claim)
    assert verdict.status == "reproduced", (
        f"{claim.expect} does not hold of {verdict.values} and {verdict.null}"
    )
    assert verdicts.from_line(verdicts.to_line(verdict)) == verdict


@pytest.mark.parametrize("address", METHODS)
def test_every_method_names_its_paper_or_its_textbook(address: str) -> None:
    text = catalogue.docstring(METHODS[address].path.read_text("utf-8"))
    named = METHODS[address].paper
    if named == "textbook":
        assert re.search(r"Paper:\s*textbook \(\S.{8,}", text), f"{address}: textbook (citation)"
    else:
        assert named in ledger.rows(), f"{address} names {named!r}, which is not in the ledger"


def _letters(title: str) -> str:
    return re.sub(r"\W+", "", title).casefold()
