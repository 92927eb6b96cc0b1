"""The page that says which method answers what: every method has a row, and every row a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stratoscope import catalogue
from support.cases import own_test

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes" / "which-method.md"


def rows(text: str) -> dict[str, list[str]]:
    """Of the last table: the cells behind each method's name."""
    table = text.rpartition("## All methods")[2]
    lines = [line.strip("| \n") for line in table.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for line in lines if (cells := line.split(" | "))}


def faults(table: dict[str, list[str]], known: set[str]) -> list[str]:
    found = [f"no row: {name}" for name in sorted(known - table.keys())]
    found += [f"no such method: {name}" for name in sorted(table.keys() - known)]
    for name, cells in table.items():
        if len(cells) != 3 or not all(len(cell) > 3 for cell in cells):
            found.append(f"{name}: a cell is empty")
        elif not re.fullmatch(r"\[test\]\(\.\./\.\./(\S+)\)", cells[2]):
            found.append(f"{name}: names no test")
        elif ROOT / cells[2][len("[test](../../") : -1] != own_test(name):
            found.append(f"{name}: the test is another method's")
        elif not own_test(name).is_file():
            found.append(f"{name}: its test is not there")
    return found


def test_every_method_has_its_row_and_every_row_its_test() -> None:
    known = {entry.address for entry in catalogue.methods()}
    assert faults(rows(PAGE.read_text("utf-8")), known) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("| `layers.logit_lens` |", "| `layers.lens` |", "no row: layers.logit_lens"),
        ("/layers/test_logit_lens.py", "/layers/test_lens.py", "the test is another method's"),
        ("| plain Hugging Face; planted fact |", "|  |", "a cell is empty"),
    ],
)
def test_a_row_that_is_wrong_is_seen(before: str, after: str, said: str) -> None:
    text = PAGE.read_text("utf-8")
    assert before in text
    known = {entry.address for entry in catalogue.methods()}
    assert any(said in fault for fault in faults(rows(text.replace(before, after)), known))
