"""Tokens are shown whole and harmless; numbers read as numbers."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope.errors import ResultError
from stratoscope.plots import tokens
from stratoscope.plots.text import number, percent, plain, readable, scientific, shorten, visible


def test_white_space_and_hidden_characters_are_visible():
    assert visible(" a\n\tb") == "␣a↵⇥b"
    assert visible("") == "∅"
    assert visible("\u202eevil\u200b\x00") == "⟨U+202E⟩evil⟨U+200B⟩⟨U+0000⟩"
    assert visible("naïve 東京 🙂") == "naïve␣東京␣🙂"
    assert readable("a b\n\u202ec") == "a b\n⟨U+202E⟩c"


def test_plain_text_has_no_markup_left():
    assert plain('<a href="x">&amp;</a>') == '&lt;a href="x"&gt;&amp;amp;&lt;/a&gt;'


def test_shortening_marks_the_cut():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1.234, "+1.23"),
        (-0.5, "−0.50"),
        (-0.001, "0.00"),
        (0.0, "0.00"),
        (np.nan, "–"),
        (np.inf, "–"),
    ],
)
def test_numbers(value, written):
    assert number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.994, "99%"),
        (0.0712, "7.1%"),
        (0.0012, "0.12%"),
        (1e-6, "<0.01%"),
        (0.0, "0.00%"),
        (np.nan, "–"),
    ],
)
def test_percentages(value, written):
    assert percent(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(2.04e-6, "2.0 × 10⁻⁶"), (-31234.0, "−3.1 × 10⁴"), (0.5, "0.5"), (0.0, "0"), (np.nan, "–")],
)
def test_errors_in_powers_of_ten(value, written):
    assert scientific(value) == written


def strip(values: list[float], words: list[str], **how: float) -> str:
    return tokens.strip(
        xr.DataArray(values, dims="position", coords={"text": ("position", words)}), **how
    )


def test_strip_tints_by_sign_and_size_and_leaves_nan_blank():
    html = strip([2.0, -1.0, np.nan], ["A", " b", " c"])
    first, second, third = html.split("<wbr>")[:3]
    assert "217,119,31,0.780" in first
    assert "61,127,193,0.390" in second
    assert ",0.000)" in third
    assert "217,119,31,0.390" in strip([2.0], ["A"], limit=4.0)
    assert ">A</span>" in first
    assert "> b</span>" in second


def test_strip_escapes_every_token():
    html = strip([1.0, 1.0], ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert 'title="&quot;&gt;' in html


def test_strip_shows_tokens_that_are_only_white_space():
    html = strip([1.0, 1.0], ["  ", "\n"])
    assert "␣␣</span>" in html
    assert "↵<br></span>" in html


def test_strip_refuses_a_second_axis():
    with pytest.raises(ResultError, match="layer"):
        tokens.strip(xr.DataArray(np.zeros((2, 2)), dims=("layer", "position")))
