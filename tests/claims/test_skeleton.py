"""A new paper's files: begun from the ledger and a specification, readable, and failing until they
are written."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope.claims import ledger, paper, skeleton, specification
from stratoscope.errors import ClaimError

SPEC = """# Specifications

## A. Vision

**metaformer** (26)
- M: y = x + Mix(Norm x); with a "quote" and a \\ sign.
- B: `architectures/vision/pooling.py`, `layers/token_influence.py`.
- S: `expect`: pooling >= attention - 0.02 and identity < 0.5. `direction`: pooling > identity.

**raftmlp** (2)
- M: rafts.

## B. Others

### anchored-bias (2024)
- **Modules**: `neurons/letter_gap.measure(lm, inputs)` and `editing/value_vector.py`.
- **Identity claim**: the planted neuron: `expect: rank == 0 and fixed == 1`.
- **Small claim `bias_goes`**: smollm2, its answers.
  `expect: wrong <= 0.5 * before and accuracy >= guess + 0.05`;
  `direction: wrong < before`.
---
### din
- **In.** `recommend/din.py` build(config).
- **C.** expect `din - pool >= 0.002 and low > 0`
"""


def test_an_entry_under_either_heading() -> None:
    assert specification.entry(SPEC, "metaformer").startswith("- M: y = x + Mix")
    assert "raftmlp" not in specification.entry(SPEC, "metaformer")
    assert specification.entry(SPEC, "raftmlp") == "- M: rafts."
    assert "wrong <= 0.5" in specification.entry(SPEC, "anchored-bias")
    assert "---" not in specification.entry(SPEC, "anchored-bias")
    with pytest.raises(ClaimError, match="it has metaformer, raftmlp, anchored-bias, din"):
        specification.entry(SPEC, "strip-mlp")


@pytest.mark.parametrize(
    ("key", "expect"),
    [
        ("metaformer", "pooling >= attention - 0.02 and identity < 0.5"),
        ("anchored-bias", "rank == 0 and fixed == 1"),
        ("din", "din - pool >= 0.002 and low > 0"),
        ("raftmlp", ""),
    ],
)
def test_what_it_expects(key: str, expect: str) -> None:
    assert specification.expected(specification.entry(SPEC, key)) == expect


@pytest.mark.parametrize(
    ("key", "address", "verb"),
    [
        ("metaformer", "architectures.vision.pooling", "build"),
        ("anchored-bias", "neurons.letter_gap", "measure"),
        ("din", "architectures.recommend.din", "build"),
    ],
)
def test_where_it_belongs(key: str, address: str, verb: str) -> None:
    plan = skeleton.plan(key, SPEC)
    assert (plan.address, plan.verb) == (address, verb)
    assert skeleton.plan(key, SPEC, "layers.other").address == "layers.other"


def test_without_a_specification_the_level_says_the_room() -> None:
    assert skeleton.plan("anchored-bias").address == "neurons.anchored_bias"
    with pytest.raises(ClaimError, match=r"--method ROOM\.NAME"):
        skeleton.plan("din")
    with pytest.raises(ClaimError, match="There is no paper 'metaformr'"):
        skeleton.plan("metaformr")


def test_every_paper_of_the_ledger_begins_as_readable_python(tmp_path: Path) -> None:
    for row in ledger.rows().values():
        made = skeleton.files(skeleton.Plan(row, "layers", "planted_name", ""))
        for path, text in made.items():
            if path.suffix == ".py":
                ast.parse(text)
        file = tmp_path / f"{row.key.replace('-', '_')}.py"
        file.write_text(made[Path("src/stratoscope/papers") / file.name])
        assert paper.read(file).year == row.year


@pytest.mark.parametrize("key", ["metaformer", "anchored-bias", "din"])
def test_the_files_pass_the_linter_and_fail_their_test(key: str, tmp_path: Path) -> None:
    plan = skeleton.plan(key, SPEC)
    made = skeleton.write(plan, tmp_path)
    assert len(made) == 4
    config = ["--config", str(skeleton.ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check"], ["format", "--check"]):
        linted = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert linted.returncode == 0, linted.stdout
    [test] = [path for path in made if path.parts[0] == "tests"]
    text = (tmp_path / test).read_text()
    assert "pytest.fail" in text
    assert f'EXAMPLE = {{"{plan.verb}": ' in text
    with pytest.raises(ClaimError, match="is there already: nothing was written"):
        skeleton.write(plan, tmp_path)


def test_an_entry_is_dealt_out_to_the_files_it_is_about(tmp_path: Path) -> None:
    """The mechanism to the method; the claims to the paper, an identity and a small one, each with
    its expectation; a real model by its name, taken as an argument."""
    made = skeleton.write(skeleton.plan("anchored-bias", SPEC), tmp_path)
    method, _, file = ((tmp_path / path) for path in made[:3])
    assert "**Modules**" in method.read_text()
    assert "claim" not in method.read_text().partition('"""')[2].partition('"""')[0]
    begun = paper.read(file)
    known, *small = begun.claims
    assert (known.tier, known.expect) == ("identity", "rank == 0 and fixed == 1")
    assert [claim.subject for claim in small] == ["smollm2", "gemma3-270m"]
    assert {claim.name for claim in small} == {"bias_goes"}
    assert small[0].expect == "wrong <= 0.5 * before and accuracy >= guess + 0.05"
    assert small[0].direction == "wrong < before"
    [claim] = paper.read(_paper_of("din", tmp_path)).named(tier="small")
    assert (claim.kind, claim.any_model) == ("miniature", False)


def _paper_of(key: str, folder: Path) -> Path:
    return folder / skeleton.write(skeleton.plan(key, SPEC), folder)[2]


def test_what_is_left_to_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "write", lambda plan: list(skeleton.files(plan)))
    (tmp_path / "spec.md").write_text(SPEC)
    run = CliRunner().invoke(skeleton.main, ["anchored-bias", "--spec", str(tmp_path / "spec.md")])
    assert run.exit_code == 0, run.output
    assert "names more, to be added by hand: editing.value_vector." in run.output
    assert "pytest tests/neurons/test_letter_gap.py && make test-changed" in run.output
    assert "claim anchored-bias --register" in run.output


def test_a_mistake_is_one_sentence() -> None:
    result = CliRunner().invoke(skeleton.main, ["metaformr"])
    assert result.exit_code == 1
    assert "There is no paper 'metaformr' among 243" in result.stderr


def test_a_long_text_is_python_for_itself() -> None:
    text = "each word of it stands apart from the next, " * 8
    written = skeleton._literal(text)
    assert ast.literal_eval(written) == text
    assert max(map(len, written.splitlines())) <= 100
