"""Tokens are shown whole and harmless; numbers read as numbers."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope.errors import ResultError
from stratoscope.models import text as models_text
from stratoscope.plots import tokens
from stratoscope.plots.text import (
    JOINED,
    isolated,
    number,
    percent,
    plain,
    prose,
    quiet,
    readable,
    runs,
    scientific,
    shorten,
    visible,
)


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
    assert ">A</bdi>" in first
    assert "> b</bdi>" in second


def test_strip_escapes_every_token():
    html = strip([1.0, 1.0], ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert 'title="&quot;&gt;' in html


def test_strip_shows_tokens_that_are_only_white_space():
    html = strip([1.0, 1.0], ["  ", "\n"])
    assert "␣␣</span>" in html
    assert "↵</span></bdi><br>" in html


def test_strip_refuses_a_second_axis():
    with pytest.raises(ResultError, match="layer"):
        tokens.strip(xr.DataArray(np.zeros((2, 2)), dims=("layer", "position")))


def test_a_combining_mark_alone_stands_on_a_circle():
    assert visible("ी") == "◌ी"
    assert visible(" ी") == "␣◌ी"
    assert visible("भी") == "भी"
    assert readable('"ा" राज') == '"◌ा" राज'


def test_joiners_are_kept_where_words_are_spelt_with_them():
    assert readable("می\u200cخواهم 👩\u200d👧") == "می\u200cخواهم 👩\u200d👧"
    assert readable("pay\u200dpal") == "pay⟨U+200D⟩pal"


def test_bytes_of_half_a_sign_are_no_text_with_spaces():
    assert visible("<20 E0 A4>") == "<20 E0 A4>"


def test_right_to_left_words_move_no_number():
    """Without isolation the sign and the bracket after the word go to its other side."""
    text = "raises “عا صم” (+6.71)"
    assert runs(text) == [("raises “", False), ("عا صم", True), ("” (+6.71)", False)]
    assert prose(text) == "raises “<bdi>عا صم</bdi>” (+6.71)"
    assert prose("<b> “שלום”") == "&lt;b&gt; “<bdi>שלום</bdi>”"
    assert plain("␣ف") == "\u2068␣ف\u2069"
    assert isolated("left") == plain("left") == "left"


def test_special_tokens_and_line_ends_stand_back():
    said = quiet("<|im_start|>user\nHi <b>[SEP]")
    faint = '<span class="special">{}</span>'.format
    assert said == (f"{faint('&lt;|im_start|&gt;')}user{faint('↵')}\nHi &lt;b&gt;{faint('[SEP]')}")


def test_strip_keeps_right_to_left_tokens_in_order_and_apart():
    words = ["ع", "ا", JOINED, " ف"]
    html = strip([1.0, -1.0, 0.5, 2.0], words)
    assert html.startswith('<div class="strip" dir="ltr"')
    assert html.count("<bdi") == len(words)
    places = [html.index(f">{word}<") for word in words]
    assert places == sorted(places)
    assert 'opacity:.55">←' in html
    assert JOINED == models_text.JOINED
