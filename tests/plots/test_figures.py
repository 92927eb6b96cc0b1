"""Figures carry the numbers they were given, on scales that can be compared, with labels that stay
apart."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope.errors import ResultError
from stratoscope.plots import bars, choose, heatmap, lines, theme
from stratoscope.plots.text import percent

RNG = np.random.default_rng(3)
TOKENS = [" to", " the", " to", "<b>", "\n"]


def grid(values: np.ndarray | None = None) -> xr.DataArray:
    values = RNG.normal(size=(4, 5)) if values is None else values
    return xr.DataArray(values, dims=("layer", "position"), coords={"text": ("position", TOKENS)})


def test_heatmap_shows_the_values_whatever_the_order_of_the_axes():
    array = grid()
    for given in (array, array.transpose("position", "layer")):
        trace = heatmap.heatmap(given, x="position", y="layer").data[0]
        np.testing.assert_array_equal(trace.z, array.values)


def test_heatmap_is_centred_at_zero_or_starts_there():
    array = grid()
    peak = float(np.abs(array.values).max())
    centred = heatmap.heatmap(array, x="position", y="layer").data[0]
    assert (centred.zmin, centred.zmax) == (-peak, peak)
    rising = heatmap.heatmap(np.abs(array), x="position", y="layer", centre=False).data[0]
    assert (rising.zmin, rising.zmax) == (0.0, peak)
    # plotly chooses the diverging scale of the theme only where it is left to choose
    assert centred.autocolorscale
    assert centred.colorscale is None


def test_several_heatmaps_share_the_scale_of_the_largest():
    effect, null = grid(), 0.1 * grid()
    common = heatmap.largest(effect, null)
    assert common == np.abs(effect.values).max()
    drawn = [
        heatmap.heatmap(a, x="position", y="layer", limit=common).data[0] for a in (effect, null)
    ]
    assert {(d.zmin, d.zmax) for d in drawn} == {(-common, common)}


def test_heatmap_keeps_nan_empty_and_out_of_the_scale():
    values = np.array([[0.5, np.nan, -2.0, 0, 0]] * 4)
    trace = heatmap.heatmap(grid(values), x="position", y="layer").data[0]
    assert trace.zmax == 2.0
    assert np.isnan(trace.z[0][1])
    assert trace.hoverongaps is False
    assert (
        heatmap.heatmap(grid(np.full((4, 5), np.nan)), x="position", y="layer").data[0].zmax == 1.0
    )


def test_equal_tokens_stay_separate_columns_and_their_markup_is_text():
    figure = heatmap.heatmap(
        grid(), x="position", y="layer", text=grid().astype(str).copy(data=np.full((4, 5), "<b>"))
    )
    axis = figure.layout.xaxis
    assert list(axis.tickvals) == [0, 1, 2, 3, 4]
    assert list(axis.ticktext) == ["␣to", "␣the", "␣to", "&lt;b&gt;", "↵"]
    assert list(figure.data[0].x) == [0, 1, 2, 3, 4]
    assert figure.data[0].text[0][0] == "&lt;b&gt;"
    assert figure.data[0].hovertext[2][3] == "layer 2 · position 3 &lt;b&gt;"


def test_layers_rise_and_queries_fall():
    array = grid()
    assert heatmap.heatmap(array, x="position", y="layer").layout.yaxis.range == (-0.5, 3.5)
    assert heatmap.heatmap(array, x="position", y="layer", upward=False).layout.yaxis.range == (
        3.5,
        -0.5,
    )


def test_axis_labels_are_those_of_the_coordinate_and_thin_out_when_they_are_many():
    far = xr.DataArray(
        np.zeros((2, 30)), dims=("head", "layer"), coords={"layer": np.arange(10, 40)}
    )
    axis = heatmap.heatmap(far, x="layer", y="head").layout.xaxis
    assert list(axis.ticktext) == ["10", "15", "20", "25", "30", "35"]
    assert axis.title.text == "layer"
    long = xr.DataArray(
        np.zeros((2, 300)), dims=("layer", "position"), coords={"text": ("position", [" a"] * 300)}
    )
    shown = heatmap.heatmap(long, x="position", y="layer", column=4).layout.xaxis.tickvals
    assert (len(shown), shown[-1]) == (100, 299)


@pytest.mark.parametrize(
    "draw", [lambda a: heatmap.heatmap(a, x="head", y="layer"), lambda a: bars.bars(a, dim="head")]
)
def test_wrong_axes_are_refused_by_name(draw):
    with pytest.raises(ResultError, match="position"):
        draw(grid())


def test_bars_are_signed_by_colour_and_say_their_value():
    parts = xr.DataArray(
        [1.25, np.nan, -0.5], dims="component", coords={"component": ["L0H1", "embed", "L1 mlp"]}
    )
    trace = bars.bars(parts, dim="component", unit="logits").data[0]
    np.testing.assert_array_equal(trace.x, parts.values)
    assert list(trace.marker.color)[::2] == [theme.TOWARDS, theme.AGAINST]
    assert list(trace.text) == ["+1.25", "–", "−0.50"]
    assert trace.hovertext[2] == "component 2 L1 mlp<br>logits −0.50"
    assert bars.bars(parts, dim="component").layout.yaxis.range == (2.5, -0.5)


def test_what_a_bar_says_is_text_too():
    rare = xr.DataArray([1e-6], dims="rank")
    assert bars.bars(rare, dim="rank", write=percent).data[0].text == ("&lt;0.01%",)


def test_bars_leave_room_for_the_numbers_beside_them():
    low, high = bars.bars(xr.DataArray([2.0, -1.0], dims="layer"), dim="layer").layout.xaxis.range
    assert low < -1.3
    assert high > 2.3
    assert bars.bars(xr.DataArray([np.nan], dims="layer"), dim="layer").layout.xaxis.range == (0, 0)


def test_grouped_bars_keep_every_series():
    rows = {"one": grid()[0], "two": grid()[1]}
    figure = bars.grouped(rows, dim="position")
    assert [trace.name for trace in figure.data] == ["one", "two"]
    for trace, row in zip(figure.data, rows.values()):
        np.testing.assert_array_equal(trace.y, row.values)


def test_ranks_are_counted_from_one_with_the_best_on_top():
    figure = lines.line(xr.DataArray([999, 9, 0], dims="depth"), dim="depth", ranks=True)
    np.testing.assert_array_equal(figure.data[0].y, [1000, 10, 1])
    bottom, top = figure.layout.yaxis.range
    assert figure.layout.yaxis.type == "log"
    assert bottom > 3 > 0 > top


def test_strongest_goes_by_magnitude_and_leaves_nan_out():
    values = xr.DataArray(
        [[1.0, -3.0], [np.nan, 2.0]], dims=("layer", "head"), coords={"layer": [4, 7]}
    )
    assert choose.strongest(values, 9) == [
        {"layer": 4, "head": 1, "value": -3.0},
        {"layer": 7, "head": 1, "value": 2.0},
        {"layer": 4, "head": 0, "value": 1.0},
    ]
    assert choose.strongest(values * np.nan, 3) == []
    assert choose.peak(values) == 3.0
    assert np.isnan(choose.peak(values * np.nan))


def test_pick_goes_by_label_where_there_is_one():
    values = xr.DataArray(
        [[1.0, -3.0], [5.0, 2.0]], dims=("layer", "head"), coords={"layer": [4, 7]}
    )
    assert choose.pick(values, layer=7, head=0) == 5.0


def test_spread_puts_every_component_in_its_place():
    parts = xr.DataArray(
        [1.0, 2.0, 3.0],
        dims="component",
        coords={"layer": ("component", [1, 0, 1]), "head": ("component", [0, 1, 1])},
    )
    np.testing.assert_array_equal(
        choose.spread(parts, "layer", "head").values, [[np.nan, 2.0], [1.0, 3.0]]
    )


@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK])
def test_scales_run_over_the_whole_range_and_meet_in_the_middle(palette):
    for scale in (palette.diverging, palette.sequential):
        places = [at for at, _ in scale]
        assert places == sorted(places)
        assert (places[0], places[-1]) == (0, 1)

    def light(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    # A colour-blind eye reads lightness: it must rise or fall all the way, from the middle on both
    # sides.
    rising = np.diff([light(c) for _, c in palette.sequential])
    assert (rising > 0).all() or (rising < 0).all()
    sides = np.diff([light(c) for _, c in palette.diverging])
    assert np.sign(sides[:2]).sum() == -np.sign(sides[2:]).sum() != 0
