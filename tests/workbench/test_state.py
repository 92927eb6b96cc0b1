"""An address says what is shown, whatever was typed; so do the lines of Python."""

from __future__ import annotations

import json
from urllib.parse import parse_qsl

import pytest

import stratoscope
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.workbench import look
from stratoscope.workbench.state import LONGEST, State
from stratoscope.workbench.unit import Unit

HOSTILE = "\"'); import os; os.abort() #\n<script>alert(1)</script> \\ \u202e ünï & = ? \ud800"


def test_an_address_is_read_back() -> None:
    for state in (
        State("m", "hello"),
        State("m", "a b\n c&d=é", " Mary", " John", "x y", seed=7, quick=True, unit="L5H3"),
        State("m", "'; --\u202e<b>", answer="=&?#"),
    ):
        assert State.read(dict(parse_qsl(state.address, keep_blank_values=True)), ("m",)) == state
    assert State.read({"prompt": "x"}, ("first", "second")).model == "first"


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ({"prompt": "x", "model": "/etc"}, "was started with m"),
        ({"prompt": "  \n"}, "is empty"),
        ({"prompt": "x" * (LONGEST + 1)}, "characters"),
        ({"prompt": "x", "corrupt": "x"}, "is the prompt itself"),
        ({"prompt": "x", "seed": "-1"}, "whole number"),
        ({"prompt": "x", "seed": "²"}, "whole number"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(query: dict[str, str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        State.read(query, ("m",))


@pytest.mark.parametrize("unit", ["L0H1", "L1N3", "L1M", "L1T2", "T0", ""])
def test_the_python_computes_what_is_shown(unit: str, tmp_path, monkeypatch, capsys) -> None:
    truth = planted.fact_lookup()
    lm = wrap(truth.model, truth.tokenizer)
    monkeypatch.setattr(stratoscope, "load", lambda name: lm, raising=False)
    monkeypatch.chdir(tmp_path)
    state = State("m", truth.clean, truth.answer, truth.foil, quick=True, unit=unit)
    names: dict = {}
    exec(compile(state.python(), "explain.py", "exec"), names)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert names["explanation"].answer == truth.answer
    assert "heads.roles" not in names["explanation"].results  # quick, as it was shown
    shown = look.changed(lm, state, Unit.parse(unit), None, None)["rows"] if unit else []
    for row in shown:
        if row["way"] == "switched off":
            chances = [chance for _, chance in row["tokens"]]
            assert names["off"]["probability"].values[0, : look.TOP] == pytest.approx(chances)
    assert "Traceback" not in capsys.readouterr().err


def test_what_was_typed_is_data_in_the_python() -> None:
    import ast

    text = State("m", HOSTILE, answer=HOSTILE).python()
    tree = ast.parse(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert HOSTILE in strings
    assert [n.names[0].name for n in tree.body if isinstance(n, ast.Import)] == ["stratoscope"]


def test_the_notebook_holds_the_same_lines() -> None:
    state = State("m", "a 'b'", unit="L0H1")
    book = json.loads(state.notebook())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"]) > 1
    assert "\n\n".join(cell["source"] for cell in book["cells"]) + "\n" == state.python()
