"""The figure of a claim: what kind of picture its shape asks for, and that every picture holds its
numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr

from stratoscope.claims import draw, figure, svg
from stratoscope.plots import theme
from stratoscope.results import label

WORDS = ["attention", "mlp", "random"]
PARTS = {"component": WORDS}


def shape(dims: tuple[str, ...], *sizes: int, **coords: list) -> xr.DataArray:
    values = np.linspace(-1, 2, int(np.prod(sizes))).reshape(sizes)
    return label(values, dims, name="a_number", method="test", coords=coords, unit="logits")


FIGURES = {
    "words": (shape(("component",), 3, component=WORDS), "bars", 1, 3),
    "numbers": (shape(("layer",), 30), "lines", 1, 30),
    "two numbers": (shape(("layer",), 2), "bars", 1, 2),
    "a number": (label(0.5, (), name="one", method="test"), "bars", 1, 1),
    "series of numbers": (shape(("component", "layer"), 3, 30, component=WORDS), "lines", 3, 30),
    "the other way round": (shape(("layer", "component"), 30, 3, component=WORDS), "lines", 3, 30),
    "words by words": (
        shape(("component", "role"), 3, 2, component=WORDS, role=["a", "b"]),
        "bars",
        2,
        3,
    ),
    "a grid": (shape(("layer", "head"), 30, 9), "cells", 9, 30),
    "three axes": (shape(("draw", "layer", "head"), 2, 12, 4), "cells", 8, 12),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_shape_is_drawn_three_times(name: str) -> None:
    array, kind, series, places = FIGURES[name]
    drawn = figure.drawing(figure.decode(figure.encode(array)))
    assert (drawn.kind, len(drawn.series), len(drawn.places)) == (kind, series, places)
    assert sorted(v for values in drawn.series.values() for v in values) == pytest.approx(
        sorted(array.values.flat), rel=1e-5
    )
    for width in (60, 80, 120):
        text = str(draw.terminal(drawn, width))
        assert max(map(len, text.splitlines())) <= width, text
        assert text.startswith(drawn.title)
    picture = draw.svg(drawn)
    assert picture == draw.svg(drawn)
    for word in (
        drawn.unit,
        *(drawn.series if series > 1 and kind != "cells" else ()),
        drawn.places[0],
    ):
        assert not word or f">{word}</text>" in picture, word
    assert "<dc:date>" not in picture
    assert draw.plotly(drawn).to_plotly_json()["data"]


def test_the_null_is_grey_and_nothing_else_is() -> None:
    bars = figure.drawing(label([1.0, 2.0, 3.0], "component", name="x", method="t", coords=PARTS))
    assert draw.colours(bars) == [draw.COLOURS[0], draw.COLOURS[0], theme.NEUTRAL]
    assert draw.colours(bars, ["mlp"])[1] == theme.NEUTRAL
    lines = figure.drawing(shape(("component", "layer"), 3, 9, component=WORDS))
    assert draw.colours(lines) == [*draw.COLOURS[:2], theme.NEUTRAL]


def test_what_says_that_it_is_a_null_is_grey_too() -> None:
    words = ["trained", "RSA, shuffled", "random_labels", "labels untrained"]
    drawn = figure.drawing(shape(("component", "layer"), 4, 9, component=words))
    assert list(drawn.series)[2] == "random labels"
    assert draw.colours(drawn) == [draw.COLOURS[0], draw.GREYS[0], draw.COLOURS[1], draw.GREYS[1]]


def test_bars_of_numbered_places_say_what_is_numbered() -> None:
    assert figure.drawing(shape(("component", "layer"), 3, 2, component=WORDS)).places == (
        "layer 0",
        "layer 1",
    )
    assert figure.drawing(shape(("component", "layer"), 3, 9, component=WORDS)).places[:2] == (
        "0",
        "1",
    )


def test_a_bar_is_as_long_as_its_number_says() -> None:
    drawn = figure.drawing(
        label([-1.0, 2.0, np.nan], "component", name="x", method="t", coords=PARTS)
    )
    minus, plus, gap = str(draw.terminal(drawn, 60)).splitlines()[1:]
    assert minus.count("█") * 2 == pytest.approx(plus.count("█"), abs=1)
    assert (gap.count("█"), gap.split()[-1]) == (0, "–")
    assert minus.index("│") == plus.index("│")


def test_a_column_is_as_high_as_its_number_says() -> None:
    drawn = figure.drawing(label([0.0, 1.0, np.nan, 0.5], "layer", name="x", method="t"))
    rows = [
        line.partition("┤")[2].ljust(16)
        for line in str(draw.terminal(drawn, 60)).splitlines()
        if "┤" in line
    ]
    height = [sum(" ▁▂▃▄▅▆▇█".index(row[4 * i]) for row in rows) for i in range(4)]
    assert height == [1, 40, 0, 20]  # zero leaves a mark, what is missing does not


def test_equal_labels_stay_apart() -> None:
    twice = label(
        np.eye(2, 9),
        ("component", "layer"),
        name="x",
        method="t",
        coords={"component": ["same", "same"]},
    )
    assert len(figure.drawing(twice).series) == 2


def test_words_of_a_figure_are_not_obeyed() -> None:
    evil = label(
        [1.0, 2.0], "component", name="x", method="t", coords={"component": ["<b>x</b>", "$y$ & z"]}
    )
    drawn = figure.drawing(evil)
    assert re.search(r"&lt;b&gt;x&lt;/b&gt;", draw.svg(drawn))
    assert "<b>" not in draw.plotly(drawn).to_json().replace("<b>x</b> <b>", "")
    assert "$y$" in str(draw.terminal(drawn, 60))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.02, "0.02"),
        (0.0213, "0.0213"),
        (-0.5, "−0.5"),
        (1234.0, "1,234"),
        (2.1e-6, "2.1 × 10⁻⁶"),
        (0, "0"),
        (np.nan, "–"),
    ],
)
def test_numbers_in_words(value: float, said: str) -> None:
    assert draw.short(float(value)) == said


def test_a_picture_is_small_and_follows_the_page_s_light() -> None:
    for array, *_ in FIGURES.values():
        picture = draw.svg(figure.drawing(array))
        assert len(picture) < 16_000
        assert f"prefers-color-scheme:dark){{text{{fill:{theme.DARK.ink}" in picture


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.1, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1, 2, [-1, 0, 1, 2]),
        (0.31, 0.35, [0.31, 0.32, 0.33, 0.34, 0.35]),
        (3, 3, [3, 4, 5, 6]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-2e-7, 1e-7, [-2e-7, -1e-7, 0, 1e-7]),
    ],
)
def test_marks_of_an_axis_are_round_and_span_the_values(
    low: float, high: float, marks: list[float]
) -> None:
    found = svg.ticks(float(low), float(high))
    assert found[0] <= low <= high <= found[-1]
    assert found == pytest.approx(marks)


def test_an_svg_bar_is_as_long_as_its_number_says() -> None:
    drawn = figure.drawing(
        label([-1.0, 2.0, np.nan], "component", name="x", method="t", coords=PARTS)
    )
    bars = re.findall(
        r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="18.0" fill', draw.svg(drawn)
    )
    (left, short), (zero, long) = ([float(x) for x in bar] for bar in bars)
    assert (left + short, 2 * short) == pytest.approx((zero, long), abs=0.2)


def test_a_line_breaks_where_there_is_no_number() -> None:
    drawn = figure.drawing(label([0.0, 1.0, np.nan, 0.5, 0.2], "layer", name="x", method="t"))
    [track] = re.findall(r'fill="none" stroke="#\w+" stroke-width="2" d="([^"]+)"', draw.svg(drawn))
    assert re.sub(r"[\d. -]", "", track) == "MLML"
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", track)]
    assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(0.5, abs=0.01)


def test_cells_below_zero_are_told_from_those_above_in_a_terminal() -> None:
    values = np.linspace(-1, 2, 70).reshape(7, 10)
    drawing = figure.drawing(xr.DataArray(values, dims=("layer", "head")))
    assert drawing.kind == "cells"
    lines = str(draw.terminal(drawing)).splitlines()
    assert "=" in lines[1] + lines[2]
    assert "█" not in lines[1]
    assert "█" in lines[-3] + lines[-4]
    assert lines[-1].strip() == "0 is blank, −2 is #, 2 is █"
