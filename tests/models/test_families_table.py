"""The stored table of architectures is what the zoo says today, and the command reads it without
any model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import stratoscope
from stratoscope.cli import main
from stratoscope.errors import FamilyError
from stratoscope.models.families import _table
from stratoscope.models.families.llama import TOWER
from stratoscope.models.family import Family, out_of
from support import families_table, tiny, zoo


@pytest.fixture(scope="module")
def stored() -> dict[str, _table.Entry]:
    return {entry.type: entry for entry in _table.entries() if entry.kind == "causal"}


def test_the_page_is_written_from_the_stored_table() -> None:
    assert families_table.PAGE.read_text("utf-8") == _table.page(_table.entries())


@pytest.mark.parametrize("name", zoo.MAKERS)
def test_the_table_is_what_the_zoo_says(name: str, stored: dict[str, _table.Entry]) -> None:
    again = families_table.found(name, "causal", lambda: zoo.lm(name))
    assert stored[name] == again, "run `make families`"


def test_every_type_of_the_mapping_stands_in_it(stored: dict[str, _table.Entry]) -> None:
    causal = list(stored.values())
    assert sorted(stored) == zoo.TYPES
    assert all(entry.why for entry in causal if entry.status in ("refused", "not tried"))
    assert sum(entry.status in ("proved", "probed") for entry in causal) >= 116


def test_the_command_prints_the_table_and_one_type() -> None:
    whole = CliRunner().invoke(main, ["families"], env={"COLUMNS": "160"})
    assert whole.exit_code == 0
    assert "qwen3_moe" in whole.output
    assert "refused" in whole.output
    one = CliRunner().invoke(main, ["families", "bamba"], env={"COLUMNS": "160"})
    assert "bamba (causal): probed" in one.output
    assert "this layer is a BambaMixer, not attention" in one.output
    slip = CliRunner().invoke(main, ["families", "qwen3_mo"])
    assert slip.exit_code == 2
    assert "qwen3_moe" in slip.output


def test_the_command_builds_no_model() -> None:
    code = (
        "import sys; from stratoscope.cli import main; main(['families', 'llama'], "
        "standalone_mode=False)"
    )
    code += "; print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_a_family_of_your_own_is_proved_or_refused() -> None:
    """Llama's MLP under other names."""
    model = tiny.model("llama")
    right = Family("mine", {"": TOWER})
    lm = stratoscope.wrap(model, family=right)
    assert lm.family is right
    wrong = Family(
        "mine", {"": TOWER.but(points={"mlp.out": out_of("self_attn"), "attn.out": out_of("mlp")})}
    )
    with pytest.raises(FamilyError, match="family `mine` does not hold"):
        stratoscope.wrap(model, family=wrong)
    with torch.no_grad():
        assert lm([[1, 2, 3]]).logits.shape == (1, 3, 96)
