"""Top examples equal a search by hand over plain hooks; a planted direction's are where it was put;
how texts are cut into runs changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.features import _texts, examples
from stratoscope.models import LM
from support.dictionaries import drawn
from support.subjects import ROWS, entering, lm_of, padded, parts, untouched

SITE = "layers.1.mlp.act"
EXAMPLE = {
    "measure": lambda case: {
        "dictionary": drawn(case.lm.dims.dim, "layers.1.resid_post"), "top": 3,
    }
}  # fmt: skip
BOS = 1


def by_hand(lm: LM, rows: list[list[int]], make: Any) -> list[tuple[float, int, int]]:
    """(value, text, place) of all tokens but BOS, the largest first."""
    found = []
    for text, row in enumerate(rows):
        values = make(entering(lm, parts(lm, 1)[1], row))
        found += [(float(v), text, at) for at, v in enumerate(values) if row[at] != BOS]
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("what", ["units", "direction", "dictionary"])
def test_equals_a_search_by_hand(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = lm_of(name), [[BOS, *ROWS[0]], ROWS[1], ROWS[0][::-1]]
    width = 128 if name == "gpt2" else 48
    line = torch.randn(width, generator=torch.Generator().manual_seed(1))
    made = drawn(width, SITE)
    asked: dict[str, Any] = {
        "units": {"site": SITE, "units": [7]},
        "direction": {"site": SITE, "direction": line},
        "dictionary": {"dictionary": made, "units": [7]},
    }[what]
    reads = {
        "units": lambda x: x[:, 7], "direction": lambda x: x @ line,
        "dictionary": lambda x: made.encode(x)[:, 7],
    }  # fmt: skip
    with untouched(lm):
        found = examples.measure(lm, padded(rows, "left"), top=5, around=2, **asked)
    expected = by_hand(lm, rows, reads[what])
    assert len(expected) == 21
    for rank, (value, text, place) in enumerate(expected[:5]):
        assert float(found.activation[0, rank]) == pytest.approx(value, abs=1e-5)
        if value > 0 or what == "units":
            assert (int(found.text[0, rank]), int(found["place"][0, rank])) == (text, place)
            row = [str(token) for token in rows[text]]
            assert str(found.token.values[0, rank]) == row[place]
            shown = "".join(row[max(0, place - 2) : place]) + f"<<{row[place]}>>"
            assert str(found.context.values[0, rank]).startswith(shown)
    values = [value for value, _, _ in expected]
    assert float(found["mean"][0]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert float(found.share[0]) == pytest.approx(sum(v > 0 for v in values) / len(values))
    monkeypatch.setattr(_texts, "AT_ONCE", 9)  # one text at a time
    again = examples.measure(lm, padded(rows, "left"), top=5, around=2, **asked)
    assert again.text.equals(found.text)
    assert again["place"].equals(found["place"])


def test_a_planted_feature_is_where_it_was_put() -> None:
    """A direction that one token's embedding alone has."""
    lm = lm_of("llama")
    embed = lm.weight("embed").detach()
    line = torch.linalg.lstsq(embed.double()[[65, 92, 3, 14, 15, 35, 89, 79, 38, 46, 26, 43]],
                              torch.eye(12).double()).solution[:, 0].float()  # fmt: skip
    found = examples.measure(lm, ROWS, site="layers.0.resid_pre", direction=line, top=14)
    assert found.token.values[0, 0] == "65"
    assert float(found.activation[0, 0]) == pytest.approx(1, abs=1e-3)
    assert abs(float(found.activation[0, 1])) < 1e-3
    assert int(found.text[0, 13]) == -1  # there are thirteen tokens
    assert found.context.values[0, 13] == ""
    assert capture(lm, ROWS, "embed")["embed"].shape[-1] == 32


def test_ties_go_to_the_earlier() -> None:
    values, places = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[0, 0], [0, 1], [1, 0]])
    empty: tuple[Tensor, Tensor] = (torch.empty(0, 1), torch.empty(0, 1, 2, dtype=torch.long))
    _, where = examples.largest(values, places, empty, 2)
    assert where[:, 0].tolist() == [[0, 1], [1, 0]]


def test_what_is_not_asked_well_is_refused() -> None:
    lm, made = lm_of("llama"), drawn(48, SITE)
    for more, said in (
        ({}, "give a dictionary, or a site"),
        ({"site": SITE, "dictionary": made}, "give a dictionary, or a site"),
        ({"dictionary": made, "direction": torch.ones(48)}, "has no units"),
        ({"site": SITE, "direction": torch.ones(9)}, "9 numbers.*has 48"),
        ({"site": SITE, "units": [48]}, "numbered 0 to 47"),
        ({"site": SITE, "top": 0}, "top=0"),
    ):
        with pytest.raises(InputError, match=said):
            examples.measure(lm, ROWS, **more)
