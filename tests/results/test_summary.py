"""Many pairs as one number: the ratio of means, its interval, and the pairs that show nothing."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope import results
from stratoscope.errors import ResultError


def pairs(clean: np.ndarray, corrupt: np.ndarray, restored: np.ndarray) -> xr.Dataset:
    """Effects (example, head) of heads that bring back so many logits, `restored` (example,
    head)."""
    effect = restored / (clean - corrupt)[:, None]
    return results.dataset(
        {
            "effect": (("example", "head"), effect),
            "null": (("example", "head"), 0 * effect),
            "clean_difference": (("example",), clean),
            "corrupt_difference": (("example",), corrupt),
        },
        method="heads.activation_patching",
        coords={"head": [0, 1, 2]},
    )


def twenty(reversed_pair: bool) -> xr.Dataset:
    generator = np.random.default_rng(0)
    clean, corrupt = generator.uniform(3, 5, 20), generator.uniform(-4, -2, 20)
    restored = (clean - corrupt)[:, None] * np.array([0.47, 0.40, 0.30]) + generator.normal(
        0, 0.1, (20, 3)
    )
    # clean 1.99 under corrupt 2.97, and the best head moves it by 3.44 logits, as on SmolLM2
    if reversed_pair:
        clean[0], corrupt[0] = 1.99, 2.97
        restored[0] = [3.44, 0.2, 0.1]
    return pairs(clean, corrupt, restored)


def test_one_reversed_pair_of_twenty_does_not_move_the_best_head() -> None:
    whole, broken = twenty(False), twenty(True)
    plain = broken["effect"].mean("example")
    # what a user would have written: the first head falls behind
    assert int(plain.argmax("head")) != 0
    assert float(plain[0]) < 0.32
    found = results.summary(broken)
    assert int(found["effect"].argmax("head")) == 0
    assert float(found["effect"][0]) == pytest.approx(
        float(results.summary(whole)["effect"][0]), abs=0.01
    )
    assert (found["effect_low"] < found["effect"]).all()
    assert (found["effect"] < found["effect_high"]).all()
    assert float(found["effect_high"][0] - found["effect_low"][0]) < 0.05
    assert found.attrs["pairs"] == 19
    assert found["effect_n"].values.tolist() == [19] * 3
    assert found.attrs["left_out"] == [
        "example 0: the clean difference 1.99 is not above the corrupt one, 2.97"
    ]
    assert "1 of 20 pairs are left out" in found.attrs["notes"]


def test_the_ratio_of_means_is_that_of_the_logits() -> None:
    clean, corrupt = np.array([2.0, 4, 6, 8, 10]), np.zeros(5)
    restored = np.arange(15.0).reshape(5, 3)
    found = results.summary(pairs(clean, corrupt, restored))
    assert found["effect"].values == pytest.approx(restored.sum(axis=0) / clean.sum())
    assert found["effect"].dims == ("head",)
    assert found["head"].values.tolist() == [0, 1, 2]


def test_a_result_without_gaps_gives_means_and_nan_where_there_is_none() -> None:
    values = np.arange(12.0).reshape(6, 2)
    values[:, 1] = np.nan
    values[0, 0] = np.nan
    found = results.summary(
        results.label(values, ("example", "position"), name="attribution", method="m")
    )
    assert float(found["attribution"][0]) == pytest.approx(np.nanmean(values[:, 0]))
    assert np.isnan(found["attribution"].values[1])
    assert found["attribution_n"].values.tolist() == [5, 0]


def test_few_examples_have_no_interval_and_none_is_refused() -> None:
    found = results.summary(twenty(False).isel(example=slice(0, 4)))
    assert np.isnan(found["effect_low"].values).all()
    assert "n too small" in found.attrs["notes"]
    with pytest.raises(ResultError, match="over examples"):
        results.summary(xr.Dataset({"score": ("head", [1.0])}))


def test_a_summary_can_be_saved(tmp_path) -> None:
    found = results.summary(twenty(True))
    results.save(found, tmp_path / "s.nc")
    assert results.load(tmp_path / "s.nc").identical(found)
