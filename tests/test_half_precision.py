"""In half precision every measure gives what float32 gives on the same weights, but for rounding;
notes say where it counts."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch

from stratoscope import catalogue, heads
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.pair import pair
from stratoscope.engine.precision import in_float32, spacing
from stratoscope.errors import InputError
from stratoscope.models import LM, wrap
from support import cases, tiny
from support.cases import REFUSALS, Case

pytestmark = pytest.mark.usefixtures("without_type_checks")
MEASURES = [
    e.address
    for e in catalogue.methods()
    if "measure" in e.verbs and e.address != "circuits.discover"
]
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [("llama", BF16), ("gpt2", FP16), ("gemma2", BF16), ("gemma2", FP16)]
# the rest is tried on the other two
ONLY = {("llama", BF16): "heads.", ("gemma2", FP16): "circuits."}
# relative, of the whole array: a few roundings (2^-8, 2^-11), made larger where effects are
# differences of logits
LIMIT = {BF16: 0.15, FP16: 0.02}
CLEAN, CORRUPT = [[38, 46, 26, 43]], [[46, 43, 38, 26]]
CIRCUITS = {
    "circuits.path_patching": {
        "paths": [("L0H1", "L1H2.k"), ("embed", "L1 mlp"), ("L1 mlp", "logits")]
    },
    "circuits.edge_attribution": {},
    "circuits.edge_attribution_ig": {"steps": 1},
    "circuits.faithfulness": {
        "circuit": [("L0H1", "L1H2.k"), ("L1H2", "logits"), ("embed", "logits")],
        "draws": 1,
    },
    "circuits.output_nodes": {"nodes": 2, "draws": 1},
}
# what is no number that rounding moves a little: counts of what is above a limit, sampled bounds,
# errors that are rounding
NOT_SMOOTH = (
    "null",
    "low",
    "high",
    "residual_error",
    "completeness_error",
    "firing",
    "answer_rank",
)
RANKS_ONLY = {"tokens.patchscope"}  # words, and the rank of one among all


@cache
def low(name: str, dtype: torch.dtype) -> LM:
    return wrap(tiny.model(name).to(dtype))


@cache
def high(name: str, dtype: torch.dtype) -> LM:
    return in_float32(low(name, dtype))


def measured(address: str, name: str, lm: LM):
    if address in CIRCUITS:
        asked = {"corrupt": CORRUPT, "answer": 5, "foil": 9}
        return catalogue.module(address).measure(lm, CLEAN, **asked, **CIRCUITS[address])
    return cases.measure(address, Case(name, lm))


@pytest.mark.parametrize(
    ("address", "name", "dtype"),
    [(a, *case) for a in MEASURES for case in CASES if a.startswith(ONLY.get(case, ""))],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_a_measure_in_half_precision_is_the_one_in_float32_but_for_rounding(address, name, dtype):
    try:
        expected = measured(address, name, high(name, dtype))
    except REFUSALS as refusal:
        pytest.skip(f"refused in float32 as well: {refusal}")
    found = measured(address, name, low(name, dtype))
    if address == "heads.roles":  # copying counts words that are among the first five
        expected, found = (
            x.sel(role=["previous_token", "induction", "name_mover"]) for x in (expected, found)
        )
    compared = 0
    for key, values in expected.data_vars.items():
        if values.dtype.kind != "f" or str(key).startswith(NOT_SMOOTH):
            continue
        one, two = values.values.astype(float), found[key].values.astype(float)
        assert (np.isfinite(one) == np.isfinite(two)).all(), key
        here = np.isfinite(one)
        if key == "counts":  # of the largest: rounding exchanges a few of them, whole
            assert (one != two).mean() <= LIMIT[dtype], key
            compared += 1
            continue
        size = np.linalg.norm(one[here])
        size = max(size, 1.0) if address in CIRCUITS else size  # shares of 1
        assert np.linalg.norm(one[here] - two[here]) <= LIMIT[dtype] * size + 1e-6, key
        compared += 1
    numbers = any(v.dtype.kind == "f" for v in expected.data_vars.values())
    assert compared or address in RANKS_ONLY or not numbers


def test_the_float32_copy_has_the_same_weights_and_is_another_model():
    lm = low("llama", BF16)
    exact = in_float32(lm)
    assert in_float32(exact) is exact
    assert exact.provenance["dtype"] == "float32"
    assert exact.provenance["model"].endswith("in float32")
    assert torch.equal(exact.weight("layers.0.mlp.out"), lm.weight("layers.0.mlp.out").float())
    plain = deepcopy(lm.model).float()(torch.tensor([[3, 4, 5]])).logits
    assert torch.equal(exact([[3, 4, 5]])["logits"], plain)
    with (
        intervene(lm, ablate("layers.0.mlp.out")),
        pytest.raises(InputError, match="another model"),
    ):
        in_float32(lm)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_spacing_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([0.7, 1.0, -1.9, 3.3, 20.0, 100.0]).to(dtype)
    up = torch.nextafter(values.abs(), torch.tensor(torch.inf, dtype=dtype))
    assert torch.allclose(
        spacing(values.float(), dtype), (up.double() - values.abs().double()).float()
    )


def test_a_note_says_where_an_effect_is_as_small_as_a_step_of_rounding():
    lm, clean, corrupt = low("llama", BF16), [[3, 14, 15, 65, 35, 89]], [[3, 14, 15, 65, 30, 89]]
    words = {"answer": 7, "foil": 9}
    both = pair(lm, clean, corrupt, **words)
    step = float(both.rounding / (both.clean_difference - both.corrupt_difference).abs())
    assert "rounding" not in both.notes()
    assert "rounding" not in both.notes(torch.tensor([2.1 * step, -0.1]))
    assert f"effect of up to {step:.2g}" in both.notes(
        torch.tensor([0.1 * step, 1.9 * step, torch.nan])
    )
    narrow = heads.activation_patching.measure(lm, clean, corrupt=corrupt, **words)
    assert "in_float32" in narrow.attrs["notes"] or float(abs(narrow.null).max()) > 2 * step
    wide = heads.activation_patching.measure(in_float32(lm), clean, corrupt=corrupt, **words)
    assert "rounding" not in wide.attrs["notes"]


def test_a_note_names_the_pairs_that_run_the_other_way():
    lm, clean, corrupt = high("gpt2", FP16), [[38, 46, 26, 43]], [[46, 43, 38, 26]]
    gap = pair(lm, clean, corrupt, 5, 9)
    words = (5, 9) if gap.clean_difference > gap.corrupt_difference else (9, 5)
    both = pair(lm, clean + corrupt, corrupt + clean, *words)
    assert (
        "1 of 2 pairs say the answer more on the corrupt prompt than on the clean one (1)"
        in both.notes()
    )
    assert pair(lm, clean, corrupt, *words).notes() == ""
