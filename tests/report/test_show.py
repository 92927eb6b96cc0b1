"""Whatever a method measures can be shown, and what is shown is what was measured."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import stratoscope as st
from stratoscope.errors import ResultError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.plots import theme


@pytest.fixture(scope="module")
def subject() -> tuple[planted.Planted, LM]:
    p = planted.induction()
    return p, wrap(p.model, p.tokenizer)


def test_every_kind_of_result(subject: tuple[planted.Planted, LM]) -> None:
    p, lm = subject
    words = {"answer": p.answer, "foil": p.foil}
    next_token = st.show(st.tokens.next_token.measure(lm, p.clean, **words))
    assert next_token.drawing.kind == "bars"
    assert next_token.drawing.places[0] == p.answer.strip()
    lens = st.show(st.layers.logit_lens.measure(lm, p.clean, answer=p.answer))
    assert (lens.drawing.kind, lens.drawing.axis) == ("cells", "depth")
    assert lens.said == ("The first of 5 ranks.",)
    patched = st.heads.activation_patching.measure(lm, p.clean, corrupt=p.corrupt, **words)
    seen = st.show(patched)
    assert seen.drawing.series == {
        f"layer {n}": tuple(patched.effect.values[0, n].tolist()) for n in range(lm.dims.layers)
    }
    assert seen.said == (f"The largest by chance: {float(patched.bound[0]):.2f}.",)
    pattern = st.heads.attention_pattern.measure(lm, p.clean).sel(layer=1, head=2)
    shown = st.show(pattern)
    assert shown.drawing.axis == "key"
    rows = pattern.isel(example=0)
    rows = rows.pattern if isinstance(rows, xr.Dataset) else rows
    assert [*shown.drawing.series.values()] == [tuple(row) for row in rows.values.tolist()]


def test_many_components_are_the_largest() -> None:
    values = np.linspace(-3, 2, 60)
    array = xr.DataArray(values, {"component": [f"L0H{n}" for n in range(60)]}, ("component",))
    shown = st.show(array)
    assert shown.said == ("The 20 largest of 60.",)
    assert shown.drawing.places[0] == "L0H0"
    assert min(map(abs, shown.drawing.series[""])) == sorted(map(abs, values))[-20]


def test_up_is_orange_and_down_is_blue() -> None:
    array = xr.DataArray([2.0, -1.0], {"component": ["up", "down"]}, ("component",))
    bars = re.findall(r'<rect [^>]*fill="(#\w+)"', st.show(array).svg)
    assert bars == [theme.TOWARDS, theme.AGAINST]


def test_more_than_two_axes_are_cut_where_the_value_is_largest() -> None:
    values = np.zeros((2, 3, 8, 9))
    values[1, 2, 4, 5] = -7
    cut = st.show(xr.DataArray(values, dims=("layer", "head", "query", "key")))
    assert cut.said == ("At layer 1, head 2, where it is largest.",)
    assert cut.drawing.range == (-7, 0)


def test_it_is_kept_by_a_notebook_and_written_to_a_file(tmp_path: Path) -> None:
    array = xr.DataArray([1.0, 2.0, 4.0], {"layer": [0, 1, 2]}, ("layer",), name="a<b>")
    shown = st.show(array)
    page = shown._repr_html_()
    assert "<script" not in page
    assert "<style" not in page
    assert "a<b>" not in page
    assert 'alt="a&lt;b&gt;"' in page
    [inside] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert base64.b64decode(inside).decode() == shown.svg
    assert re.search("█.*\n", repr(shown))
    assert shown.save(tmp_path / "a.svg").read_text() == shown.svg
    assert inside in shown.save(tmp_path / "a.html").read_text()
    with pytest.raises(ResultError, match=r"saved as \.svg or \.html"):
        shown.save(tmp_path / "a.png")


def test_what_cannot_be_shown_is_said() -> None:
    numbers = xr.Dataset({"effect": (("example", "layer"), np.ones((2, 3)))})
    assert st.show(numbers, example=1).said == ("Example 1 of 2.",)
    with pytest.raises(ResultError, match=r"example=2: the result has 2"):
        st.show(numbers, example=2)
    with pytest.raises(ResultError, match=r"'efect': the result has the numbers effect"):
        st.show(numbers, "efect")
    with pytest.raises(ResultError, match="no number to draw"):
        st.show(xr.Dataset({"token": (("layer",), ["a", "b"])}))


def test_what_programs_begin_with_stands_at_the_top() -> None:
    names = {"load", "wrap", "capture", "intervene", "ablate", "generate", "explain", "show"}
    assert names <= set(dir(st))
    assert all(callable(getattr(st, name)) for name in names)
    assert st.plots.heatmap.heatmap
    assert st.report.page.render
