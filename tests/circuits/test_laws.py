"""The laws every method keeps, for the methods of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stratoscope.circuits import (
    discover,
    edge_attribution,
    edge_attribution_ig,
    faithfulness,
    path_patching,
)
from stratoscope.models import LM
from stratoscope.results import load, save
from support import circuits as subjects
from support import tiny
from support.nightly import by_night
from support.subjects import padded, untouched

PATHS = [("embed", "L0H1.v"), ("L0H2", "L1H3.k"), (["L0 mlp", "L1H0"], ["L2H0", "logits"])]
METHODS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "path_patching": (path_patching.measure, {"paths": PATHS}),
    "edge_attribution": (edge_attribution.measure, {}),
    "edge_attribution_ig": (edge_attribution_ig.measure, {"steps": 2}),
    "faithfulness": (
        faithfulness.measure,
        {"circuit": [("embed", "L0 mlp"), ("L0 mlp", "logits")]},
    ),
}
every = pytest.mark.parametrize("method", METHODS)


def run(
    method: str, lm: LM, clean: Any = subjects.CLEAN, corrupt: Any = subjects.CORRUPT, **more: Any
) -> Any:
    verb, options = METHODS[method]
    return verb(lm, clean, corrupt=corrupt, **subjects.ASKED, **options, **more)


@every
@pytest.mark.parametrize("name", by_night(["llama", "gpt_neox"], ["gpt_neox"]))
def test_the_model_is_untouched_and_the_same_seed_gives_the_same(method, name):
    lm = tiny.lm(name)
    with untouched(lm):
        first = run(method, lm)
    assert first.identical(run(method, lm))


@every
@pytest.mark.parametrize("name", by_night(["llama", "gemma2", "gpt2"], ["gemma2"]))
def test_batched_equals_single_under_any_padding(method, name):
    lm = tiny.lm(name)
    singles = [
        run(method, lm, [clean], [corrupt])
        for clean, corrupt in zip(subjects.CLEAN, subjects.CORRUPT)
    ]
    for side in ("left", "right"):
        whole = run(method, lm, padded(subjects.CLEAN, side), padded(subjects.CORRUPT, side))
        for number, single in enumerate(singles):
            for key, values in single.data_vars.items():
                # effects are shares of a small difference: rounding is relative to them
                if "example" in values.dims:
                    np.testing.assert_allclose(
                        whole[key][number], values[0], atol=1e-4, rtol=1e-4, err_msg=f"{key} {side}"
                    )


@every
def test_results_save_and_load(method, tmp_path):
    found = run(method, tiny.lm("llama"))
    save(found, tmp_path / "x.nc")
    assert load(tmp_path / "x.nc").identical(found)
    assert found.attrs["method"] == f"circuits.{method}"
    assert found.attrs["null_kind"]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_frozen_weights_and_direction(direction):
    lm = tiny.lm("llama")
    flags = [p.requires_grad for p in lm.model.parameters()]
    expected = run("edge_attribution", lm, direction=direction)
    lm.model.requires_grad_(False)
    try:
        assert run("edge_attribution", lm, direction=direction).identical(expected)
    finally:
        for parameter, flag in zip(lm.model.parameters(), flags):
            parameter.requires_grad_(flag)


def test_discovery_keeps_them_too(tmp_path):
    one, lm = subjects.everything()["two_hop"], subjects.lm_of("two_hop")
    with untouched(lm):
        found = discover.measure(lm, one.clean, limit=5, **subjects.options(one))
    assert found.identical(discover.measure(lm, one.clean, limit=5, **subjects.options(one)))
    save(found, tmp_path / "x.nc")
    assert load(tmp_path / "x.nc").identical(found)
