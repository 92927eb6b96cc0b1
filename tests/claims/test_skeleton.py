"""A new paper's files: begun from the ledger and a specification, readable, and failing until they
are written."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope.claims import ledger, paper, skeleton
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
- **Modules**: `neurons/letter_gap.py measure(lm, inputs)` and `editing/value_vector.py`.
- **Small claim**: `expect: wrong <= 0.5 * before and accuracy >= guess + 0.05`.
---
### din
- **In.** `recommend/din.py` build(config).
- **C.** expect `din - pool >= 0.002 and low > 0`
"""


def test_an_entry_under_either_heading() -> None:
    assert skeleton.entry(SPEC, "metaformer").startswith("- M: y = x + Mix")
    assert "raftmlp" not in skeleton.entry(SPEC, "metaformer")
    assert skeleton.entry(SPEC, "raftmlp") == "- M: rafts."
    assert "wrong <= 0.5" in skeleton.entry(SPEC, "anchored-bias")
    assert "---" not in skeleton.entry(SPEC, "anchored-bias")
    with pytest.raises(ClaimError, match="it has metaformer, raftmlp, anchored-bias, din"):
        skeleton.entry(SPEC, "strip-mlp")


@pytest.mark.parametrize(
    ("key", "expect"),
    [
        ("metaformer", "pooling >= attention - 0.02 and identity < 0.5"),
        ("anchored-bias", "wrong <= 0.5 * before and accuracy >= guess + 0.05"),
        ("din", "din - pool >= 0.002 and low > 0"),
        ("raftmlp", ""),
    ],
)
def test_what_it_expects(key: str, expect: str) -> None:
    assert skeleton.expected(skeleton.entry(SPEC, key)) == expect


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


def test_a_mistake_is_one_sentence() -> None:
    result = CliRunner().invoke(skeleton.main, ["metaformr"])
    assert result.exit_code == 1
    assert "There is no paper 'metaformr' among 243" in result.stderr


def test_a_long_text_is_python_for_itself() -> None:
    text = "each word of it stands apart from the next, " * 8
    written = skeleton._literal(text)
    assert ast.literal_eval(written) == text
    assert max(map(len, written.splitlines())) <= 100
