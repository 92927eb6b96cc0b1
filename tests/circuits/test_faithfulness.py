"""A circuit run alone: every edge is the clean run, none the corrupt one, and all but one is that
edge patched."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from stratoscope.circuits import faithfulness, path_patching
from stratoscope.engine import edges
from stratoscope.engine.metric import last_logits
from stratoscope.engine.pair import pair
from stratoscope.engine.wiring import wiring
from stratoscope.errors import InputError
from stratoscope.maths import resample
from support import circuits as subjects
from support import tiny

EXAMPLE = {
    "measure": lambda case: {
        "corrupt": case.corrupt,
        "answer": case.answer,
        "foil": case.foil,
        "draws": 2,
    }
}
WHOLE_ANSWER = {"draws": 1}

WITH_EDGES = [name for name in tiny.DECODERS if name != "bloom"]


@pytest.mark.parametrize("name", WITH_EDGES)
@torch.no_grad()
def test_every_edge_is_the_clean_run_none_the_corrupt_and_all_but_one_that_edge_patched(name):
    lm = tiny.lm(name)
    wires = wiring(lm)
    [one] = next(edges.ends(lm, pair(lm, subjects.CLEAN[0], subjects.CORRUPT[0], 5, 9, "noise")))

    def run(circuits):
        with one.layers:
            streams = faithfulness.run_circuits(
                one.layers, one.base.writes[0], one.source.writes, torch.stack(circuits)
            )
        return lm.readout(streams[:, -1:])[:, 0]

    clean, corrupt = (last_logits(lm, [rows[0]]) for rows in (subjects.CLEAN, subjects.CORRUPT))
    paths = random.Random(name).sample(wires.edges, 24)
    circuits = [wires.mask, torch.zeros_like(wires.mask)]
    for (sender,), (receiver,) in paths:
        circuits.append(wires.mask.clone())
        circuits[-1][receiver, sender] = False
    every, none, *without = run(circuits)  # together, and two of them alone
    assert float((every - clean).abs().max()) < 1e-4
    assert float((none - corrupt).abs().max()) < 1e-4
    assert float((run(circuits[1:2]) - corrupt).abs().max()) < 1e-4
    assert float((run(circuits[2:3]) - without[0]).abs().max()) < 1e-5
    assert float((clean - corrupt).abs().max()) > 1e-2
    for logits, expected in zip(without, edges.exact(one, one.delta, paths).tolist()):
        assert float(one.metric(logits[None])) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", subjects.NAMES)
def test_the_planted_circuit_is_enough_and_is_all(name):
    one = subjects.everything()[name]
    found = faithfulness.measure(
        subjects.lm_of(name),
        one.clean,
        circuit=sorted(subjects.truth(one)),
        **subjects.options(one),
    )
    assert float(found.faithfulness[0]) == pytest.approx(1, abs=0.05)
    assert float(found.completeness[0]) == pytest.approx(0, abs=0.05)
    assert float(abs(found.null).max()) < 0.1
    assert found.attrs["edges"] == len(subjects.truth(one))
    part = faithfulness.measure(
        subjects.lm_of(name), one.clean, circuit=sorted(one.edges)[1:], **subjects.options(one)
    )
    assert float(part.faithfulness[0]) < 0.5  # one edge of the chain is missing


def test_without_what_opposes_the_answer_a_circuit_is_too_good():
    one, lm = subjects.everything()["suppression"], subjects.lm_of("suppression")
    found = faithfulness.measure(lm, one.clean, circuit=sorted(one.edges), **subjects.options(one))
    assert float(found.faithfulness[0]) > 1.25


def test_the_mean_is_taken_position_by_position_over_the_prompts_that_reach_it():
    writes = [torch.randn(3, width, 4) for width in (5, 2, 3)]
    found = faithfulness._mean(writes)
    for position in range(5):
        reached = [w[:, position] for w in writes if w.shape[1] > position]
        assert torch.allclose(found[:, position], torch.stack(reached).mean(dim=0), atol=1e-6)


def test_mean_ablation_is_resampling_where_all_corrupt_prompts_are_one():
    one, lm = subjects.everything()["induction"], subjects.lm_of("induction")
    asked = {
        "corrupt": [one.corrupt] * 2,
        "answer": one.answer,
        "foil": one.foil,
        "circuit": sorted(one.edges)[:2],
    }
    runs = [
        faithfulness.measure(lm, [one.clean] * 2, ablation=kind, **asked)
        for kind in ("mean", "resample")
    ]
    np.testing.assert_allclose(runs[0].faithfulness, runs[1].faithfulness, atol=1e-4)
    variants = one.variants(4)
    means = faithfulness.measure(
        lm,
        [v.clean for v in variants],
        corrupt=[v.corrupt for v in variants],
        ablation="mean",
        answer=[v.answer for v in variants],
        foil=[v.foil for v in variants],
        circuit=sorted(one.edges),
    )
    assert np.isfinite(means.faithfulness).all()


def test_the_interval_is_the_house_s_and_too_few_examples_have_none():
    """Two prompts have no 95 % interval: a percentile bootstrap of them holds the truth in 52 of
    100 cases."""
    one, lm = subjects.everything()["induction"], subjects.lm_of("induction")

    def measured(count):
        some = one.variants(count)
        return faithfulness.measure(
            lm,
            [v.clean for v in some],
            corrupt=[v.corrupt for v in some],
            answer=[v.answer for v in some],
            foil=[v.foil for v in some],
            circuit=sorted(one.edges)[:2],
            draws=1,
        )

    few, many = measured(2), measured(8)
    assert np.isnan([few.low, few.high]).all()
    assert "n too small: 2 " in few.attrs["notes"]
    expected = resample.interval(many.faithfulness.values.astype(float), seed=0)
    assert (float(many.low), float(many.high)) == (expected.low, expected.high)
    assert many.low < many.faithfulness.mean() < many.high
    assert "n too small" not in many.attrs["notes"]


def test_a_measured_result_is_a_circuit_once_its_strong_edges_are_selected():
    one, lm = subjects.everything()["induction_gpt2"], subjects.lm_of("induction_gpt2")
    exact = path_patching.measure(lm, one.clean, **subjects.options(one))
    strong = exact.isel(edge=np.abs(exact.effect.values[0]) > 0.2)
    runs = [
        faithfulness.measure(lm, one.clean, circuit=circuit, **subjects.options(one))
        for circuit in (strong, sorted(one.edges))
    ]
    assert float(runs[0].faithfulness[0]) == float(runs[1].faithfulness[0])


def test_bad_circuits_are_refused():
    lm = tiny.lm("llama")
    asked = {"corrupt": subjects.CORRUPT[:1], **subjects.ASKED}
    for circuit, said in (([("embed", "L9 mlp")], "L9 mlp"), ([("L2H0", "L1H0.q")], "no path")):
        with pytest.raises(InputError, match=said):
            faithfulness.measure(lm, subjects.CLEAN[:1], circuit=circuit, **asked)
