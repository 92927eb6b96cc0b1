"""`papers`, `paper` and `claim` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stratoscope import cli
from stratoscope.claims import paper, verdicts
from stratoscope.lab import planted


@pytest.fixture(autouse=True)
def _folder(folder: Path) -> None:
    """Every command sees the tests' papers."""


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(cli.main, arguments, env={"COLUMNS": str(width)})


def flat(text: str) -> str:
    return " ".join(text.split())


def test_papers_lists_every_row_with_its_status() -> None:
    result = run("papers")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.output.splitlines())) <= 80
    assert len([line for line in result.output.splitlines() if "not built  " in line]) == 241
    assert "243 of 243 papers: 2 built, not run, 241 not built." in result.output
    run("claim", "llm-drop")
    assert "1 reproduced, 1 built, not run, 241 not built." in run("papers").output
    run("claim", "llm-drop", "--seed", "7")
    assert "1 not reproduced, 1 built, not run, 241 not built." in run("papers").output


def test_papers_by_level_and_status() -> None:
    layers = run("papers", "--level", "layer", width=120).output
    assert "What Matters in Transformers? Not All Attention is Needed" in layers
    assert "9 of 243 papers: 1 built, not run, 8 not built." in layers
    assert (
        "1 of 243 papers: 1 built, not run."
        in run("papers", "--level", "layer", "--status", "built, not run").output
    )
    assert "0 of 243 papers." in run("papers", "--status", "reproduced").output
    for option, wrong, near in (
        ("--level", "layers", "layer"),
        ("--status", "reproducd", "reproduced"),
    ):
        result = run("papers", option, wrong)
        assert (result.exit_code, f"Nearest: {near}" in result.stderr) == (2, True)


def test_papers_lists_what_runs_across_them_and_what_is_not_written(folder: Path) -> None:
    text = (folder / "lazy_neuron.py").read_text().replace("A. Uthor, 2023.", "Ours, 2026.")
    said = "Across: llm-drop, lazy-neuron\nWhat would change our mind: a fact.\nMethods:"
    (folder / "two_together.py").write_text(text.replace("Methods:", said))
    listed = run("papers").output
    assert "two-together" in listed.partition("across papers  ")[2]
    assert "243 of 243 papers: 2 built, not run, 241 not built. And 1 across papers." in flat(
        listed
    )
    assert "Protocol: lazy-neuron, two-together." in flat(listed)
    assert "What would change our mind: lazy-neuron, llm-drop." in flat(listed)
    assert "What the authors may object: lazy-neuron, llm-drop, two-together." in flat(listed)
    alone = run("papers", "--level", "across papers").output
    assert "0 of 243 papers. And 1 across papers." in alone
    assert "What would change our mind" not in alone
    assert "two-together" not in run("papers", "--status", "not built").output
    assert "not written" not in run("papers", "--status", "not built").output


def test_a_broken_paper_file_is_said_and_hides_nothing(folder: Path) -> None:
    (folder / "back_patching.py").write_text('"""Nothing more."""')
    (folder / "no_such_paper.py").write_text((folder / "llm_drop.py").read_text())
    said = flat(run("papers").output)
    assert "243 of 243 papers: 2 built" in said
    assert "Warning: back_patching.py cannot be read as a paper" in said
    assert "Warning: no_such_paper.py is no paper of the ledger." in said
    assert "Warning: back_patching.py cannot be read" in flat(run("paper", "back-patching").output)
    assert "no line `Claim: ...`" in flat(run("claim", "back-patching").stderr)


def test_claim_says_what_is_expected_before_it_measures(folder: Path) -> None:
    result = run("claim", "llm-drop", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.output.splitlines())) <= 80
    order = [
        "Dropping attention layers costs little",
        "expected   attention <= 0.5 * mlp and attention < random",
        "null       random: as many layers, drawn at random",
        "verdict    reproduced",
        "attention  0.02  [0.01 to 0.04]",
        "random     0.35  the null",
        "mlp        ██████",
        "kept in",
    ]
    places = [result.output.index(words) for words in order]
    assert places == sorted(places)
    [kept], problems = verdicts.read([folder / "verdicts"])
    assert problems == []
    assert (kept.key, kept.claim, kept.seed, kept.tier) == (
        "llm-drop",
        "attention_goes_first",
        3,
        "small",
    )
    assert json.loads((folder / "verdicts" / "llm-drop.jsonl").read_text())["figure"]["dims"] == [
        "component"
    ]


@pytest.mark.parametrize(
    ("seed", "code", "said"),
    [("9", 130, "Interrupted"), ("8", 1, "Unexpected RuntimeError: half-way")],
)
def test_claim_that_stops_half_way_keeps_nothing(
    folder: Path, seed: str, code: int, said: str
) -> None:
    result = run("claim", "llm-drop", "--seed", seed)
    assert result.exit_code == code
    assert "attention_goes_first was not measured to its end: nothing is kept of it." in flat(
        result.stderr
    )
    assert said in flat(result.stderr)
    assert not (folder / "verdicts").exists()


def test_claim_by_name_and_tier() -> None:
    assert "Nothing dropped costs nothing" in run("claim", "llm-drop", "--tier", "identity").output
    result = run("claim", "llm-drop", "--claim", "nothing_costs_nothing")
    assert result.exit_code == 2
    assert (
        "no small claim named 'nothing_costs_nothing'; it has attention_goes_first (small, a made-"
        in flat(result.stderr)
    )
    own = flat(run("claim", "llm-drop", "--tier", "paper").output)
    assert "llm-drop on the paper's own models: Llama-2-13B, half of its attention layers" in own


@pytest.mark.parametrize("command", ["paper", "claim"])
def test_an_unknown_key_gets_the_nearest(command: str) -> None:
    result = run(command, "llm-dorp")
    assert result.exit_code == 2
    assert "There is no paper 'llm-dorp' among 243. Nearest: llm-drop" in flat(result.stderr)
    assert (
        "is not built: there is nothing to run. src/stratoscope/papers/retrieval_heads.py"
        in flat(run("claim", "retrieval-heads").stderr)
    )


def test_a_folder_that_cannot_be_written_to_is_said(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verdicts.add

    def refuse(file: Path, line: bytes) -> None:
        if file.parent == folder / "verdicts":
            raise PermissionError(13, "Permission denied")
        real(file, line)

    monkeypatch.setattr(verdicts, "add", refuse)
    said = flat(run("claim", "llm-drop", width=120).output)
    assert "(the package's own folder cannot be written to)" in said
    assert (tmp_path / "cache" / "verdicts" / "llm-drop.jsonl").is_file()
    # and it is read from there
    assert "verdict reproduced" in flat(run("paper", "llm-drop").output)


def test_paper_before_and_after() -> None:
    before = run("paper", "llm-drop")
    assert before.exit_code == 0, before.stderr
    assert max(map(len, before.output.splitlines())) <= 80
    for words in (
        "it says half of the attention layers can go at little cost, unlike MLPs.",
        "layers.logit_lens: The logit lens",
        "status built, not run",
        "expected attention <= 0.5 * mlp",
        "checked in every test run",
        "own models Llama-2-13B, half of its attention layers, on the authors' benchmarks.",
        "stratoscope claim llm-drop --tier small",
    ):
        assert words in flat(before.output)
    for seed in ("0", "7"):
        run("claim", "llm-drop", "--seed", seed)
    after = flat(run("paper", "llm-drop").output)
    assert "status not reproduced (0 of 1 models)" in after
    assert "seeds 0 reproduced" in after
    assert "█" in after


def test_paper_says_when_words_changed_after_the_measurement(folder: Path) -> None:
    run("claim", "llm-drop", "--seed", "7")
    file = folder / "llm_drop.py"
    file.write_text(file.read_text().replace("0.5 * mlp", "5 * mlp"))
    said = flat(run("paper", "llm-drop").output)
    assert "status built, not run" in said
    assert "A verdict on attention_goes_first (not reproduced, " in said
    assert "the words changed after the measurement: expect was `attention <= 0.5 * mlp" in said


def test_paper_that_is_not_built_tells_what_it_would_take() -> None:
    said = flat(run("paper", "retrieval-heads").output)
    assert "status not built" in said
    assert "to check SmolLM: <10% of heads score" in said


def test_paper_as_a_page(tmp_path: Path) -> None:
    run("claim", "llm-drop", "--seed", "7")
    out = tmp_path / "page.html"
    assert f"Page: {out.as_uri()}" in run("paper", "llm-drop", "--out", str(out)).output
    html = out.read_text()
    assert "default-src 'none'" in html
    assert '<b class="not-reproduced">not reproduced</b>' in html
    assert "attention &lt;= 0.5 * mlp and attention &lt; random" in html
    assert "Tried on &lt;made-up&gt; numbers" in html
    assert html.count("data:image/svg+xml;base64,") == 2  # all seeds, and the verdict's own
    assert "plotly" not in html.lower()
    assert len(html) < 60_000
    assert "could not be written" in flat(
        run("paper", "llm-drop", "--out", str(tmp_path / "no" / "x.html")).stderr
    )
    other = tmp_path / "other.html"
    assert run("paper", "retrieval-heads", "--out", str(other)).exit_code == 0
    assert "not built" in other.read_text()


# on a model of the reader's own -------------------------------------------------------------------

OWN = """
@claim(
    says="It is so",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2",),
    n="3 texts",
    expect="layers > chance",
    null={"chance": "none"},
)
def it_has_layers(lm, seed: int) -> Measured:
    \"\"\"How many layers.\"\"\"
    return Measured(values={"layers": lm.dims.layers}, null={"chance": seed}, n=3)
"""


@pytest.fixture
def model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder, a paper with a claim on any model, and a working directory."""
    file = folder / "lazy_neuron.py"
    file.write_text(file.read_text() + "\n" + OWN)
    made, here = tmp_path / "mine", tmp_path / "here"
    p = planted.induction(0)
    p.model.save_pretrained(made)
    p.tokenizer.save_pretrained(made)
    here.mkdir()
    monkeypatch.chdir(here)
    return made


def test_a_claim_on_the_readers_model_goes_to_the_readers_file(model: Path, folder: Path) -> None:
    done = run("claim", "lazy-neuron", "--claim", "it_has_layers", "--model", str(model))
    assert done.exit_code == 0, done.stderr
    [kept], problems = verdicts.read([Path("claims")])
    assert problems == []
    assert (kept.subject, kept.status, kept.values) == (str(model), "reproduced", {"layers": 2.0})
    assert not (folder / "verdicts").exists()
    other = ["--out", "mine.jsonl", "--seed", "2"]
    run("claim", "lazy-neuron", "--claim", "it_has_layers", "--model", str(model), *other)
    line = json.loads(Path("mine.jsonl").read_text())
    assert (line["seed"], line["status"]) == (2, "not reproduced")
    assert "built, not run" in run("papers", "--level", "neuron").output


def test_one_claim_on_two_subjects_is_measured_once_on_a_model(model: Path, folder: Path) -> None:
    file = folder / "lazy_neuron.py"
    two = OWN.replace('("smollm2",)', '("smollm2", "gemma3-270m")')
    file.write_text(file.read_text().replace(OWN, two))
    run("claim", "lazy-neuron", "--claim", "it_has_layers", "--model", str(model))
    assert len(Path("claims/lazy-neuron.jsonl").read_text().splitlines()) == 1
    listed = flat(run("claim", "--all", "--seeds", "0", "--dry-run").output)
    for subject in ("smollm2", "gemma3-270m"):
        assert f"lazy-neuron it_has_layers on {subject}, seed 0: not run" in listed


def test_a_claim_with_a_subject_of_its_own_says_so(model: Path) -> None:
    done = run("claim", "llm-drop", "--model", str(model))
    assert done.exit_code == 2
    assert (
        "attention_goes_first of llm-drop brings a subject of its own and cannot be measured on"
        in flat(done.stderr)
    )
    assert "none of its claims can" in flat(done.stderr)


def test_options_that_do_not_go_together(model: Path) -> None:
    out = run("claim", "llm-drop", "--out", "x.jsonl")
    assert (out.exit_code, "--out is for --model" in out.stderr) == (2, True)
    every = run("claim", "--all", "--model", str(model))
    assert (every.exit_code, "--all measures the atlas" in every.stderr) == (2, True)
    none = run("claim", "lazy-neuron", "--subject", "gemma3-270m")
    assert "has no small claim on 'gemma3-270m'; it has it_is_so (small, smollm2)" in flat(
        none.stderr
    )


def test_at_least_five_real_claims_take_any_language_model() -> None:
    real, broken = paper.shelf(Path(paper.__file__).parents[1] / "papers")
    assert broken == {}
    found = {(p.key, c.name): set() for p in real.values() for c in p.claims if c.any_model}
    for p in real.values():
        for c in p.claims:
            if c.any_model:
                found[p.key, c.name].add(c.subject)
    both = [subjects for subjects in found.values() if {"smollm2", "gemma3-270m"} <= subjects]
    assert len(both) >= 5
