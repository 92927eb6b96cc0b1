"""EAP is the derivative of the exact effect; EAP-IG ranks the planted edges first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stratoscope.circuits import edge_attribution, edge_attribution_ig
from stratoscope.engine import edges
from stratoscope.engine.pair import pair
from stratoscope.engine.wiring import wiring
from stratoscope.models import wrap
from support import circuits as subjects
from support import tiny
from support.nightly import by_night

EXAMPLE = {
    "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer, "foil": case.foil}
}

WITH_EDGES = [name for name in tiny.DECODERS if name != "bloom"]


FLOOR = 0.95  # of EAP-IG's AUROC on every planted model; written before seeds 1 and 2 were measured


@pytest.mark.parametrize("name", WITH_EDGES)
def test_attribution_is_the_finite_difference_of_the_exact_effect(name):
    """A central difference of size 0.01 on every fourth edge, in double precision (which fused
    experts do not take)."""
    lm = wrap(tiny.model(name).to(torch.float32 if name == "mixtral" else torch.float64))
    [one] = next(edges.ends(lm, pair(lm, subjects.CLEAN[0], subjects.CORRUPT[0], 5, 9, "noise")))
    wires, size = wiring(lm), 1e-2
    asked = wires.edges[::4]
    up, down = (edges.exact(one, sign * size * one.delta, asked) for sign in (1, -1))
    expected = (up - down) / (2 * size)
    slope = edge_attribution.slopes(one, one.delta[None])[0]
    found = torch.tensor([slope[receiver, sender] for (sender,), (receiver,) in asked])
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    assert float((found - expected).abs().max()) < 1e-2 * float(expected.abs().max())
    assert int((expected.abs() > 1e-3).sum()) > len(asked) // 3
    assert not slope[~wires.mask].any()


@pytest.mark.parametrize("seed", by_night([0, 1, 2], [0]))
@pytest.mark.parametrize("name", subjects.NAMES)
def test_planted_edges_come_first(name, seed, record_property):
    one = subjects.everything(seed)[name]
    area = {}
    for method in (edge_attribution, edge_attribution_ig):
        found = method.measure(subjects.lm_of(name, seed), one.clean, **subjects.options(one))
        true = [edge in subjects.truth(one) for edge in subjects.pairs(found)]
        area[method.__name__.rpartition(".")[2]] = float(
            roc_auc_score(true, np.abs(found.effect.values[0]))
        )
        assert float(np.abs(found.null).max()) < float(np.abs(found.effect).max())
    for key, value in area.items():
        record_property(f"auroc {key} {name} seed {seed}", value)
    assert area["edge_attribution_ig"] >= FLOOR, area


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edges_into_the_read_out_sum_to_its_own_slope(name):
    """All senders together are the whole change of what the read-out reads, so their slopes add up
    to one number."""
    lm = tiny.lm(name)
    [one] = next(edges.ends(lm, pair(lm, subjects.CLEAN[0], subjects.CORRUPT[0], 5, 9, "noise")))
    x = one.base.final[-1:].clone().requires_grad_(True)
    logits = lm.readout(x)
    [slope] = torch.autograd.grad(logits[0, 5] - logits[0, 9], x)
    expected = float((slope * (one.source.final - one.base.final)[-1:]).sum())
    found = float(edge_attribution.slopes(one, one.delta[None])[0, -1].sum())
    assert found == pytest.approx(expected, rel=1e-3)
