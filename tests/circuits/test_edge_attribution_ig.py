"""Integrated gradients of edges stand where single gradients are saturated."""

from __future__ import annotations

import numpy as np
import pytest

from stratoscope.circuits import edge_attribution, edge_attribution_ig
from stratoscope.engine import edges
from stratoscope.engine.pair import pair
from stratoscope.errors import InputError
from support import circuits as subjects
from support import tiny

EXAMPLE = {
    "measure": lambda case: {
        "corrupt": case.corrupt,
        "answer": case.answer,
        "foil": case.foil,
        "steps": 2,
    }
}
WHOLE_ANSWER = {"steps": 1}


def test_integrated_gradients_stand_where_saturated_gradients_fall():
    """In the planted four-layer circuit attention is saturated at the clean prompt: EAP there ranks
    worse."""
    one, lm = subjects.everything()["indirect_object"], subjects.lm_of("indirect_object")
    runs = [
        m.measure(lm, one.clean, **subjects.options(one))
        for m in (edge_attribution, edge_attribution_ig)
    ]
    true = np.array([edge in one.edges for edge in subjects.pairs(runs[0])])
    weakest, strongest_other = zip(
        *(
            (np.abs(run.effect.values[0])[true].min(), np.abs(run.effect.values[0])[~true].max())
            for run in runs
        )
    )
    assert weakest[0] < strongest_other[0]
    assert weakest[1] > strongest_other[1]


def test_one_step_is_the_gradient_half_way_and_no_step_is_refused():
    lm = tiny.lm("qwen3")
    [one] = next(edges.ends(lm, pair(lm, subjects.CLEAN[0], subjects.CORRUPT[0], 5, 9, "noise")))
    half = 0.5 * (one.base.writes[:1] + one.source.writes[:1])
    expected = edge_attribution.slopes(one, one.delta[None], start=half)
    found = edge_attribution_ig.averaged_slopes(one, one.delta[None], 1)
    assert tiny.gap(found, expected) < 1e-6
    assert tiny.gap(found, edge_attribution.slopes(one, one.delta[None])) > 1e-3
    with pytest.raises(InputError, match="steps=0"):
        edge_attribution_ig.measure(
            lm, subjects.CLEAN, corrupt=subjects.CORRUPT, steps=0, **subjects.ASKED
        )
