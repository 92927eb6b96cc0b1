"""Discovery keeps the planted edges, and its curves say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.circuits import discover, edge_attribution, faithfulness, graph
from stratoscope.engine import edges
from stratoscope.errors import InputError
from support import circuits as subjects
from support import tiny

EXAMPLE = {
    "measure": lambda case: {
        "corrupt": case.corrupt,
        "answer": case.answer,
        "foil": case.foil,
        "keep": "top",
    }
}
WHOLE_ANSWER = {"limit": 3, "keep": "top"}


@pytest.mark.parametrize(
    "name", ["induction", "fact_lookup_moved", "suppression", "indirect_object"]
)
def test_the_planted_circuit_is_found(name):
    one, lm = subjects.everything()[name], subjects.lm_of(name)
    found = discover.measure(lm, one.clean, **subjects.options(one))
    kept = set(subjects.pairs(found))
    assert one.edges <= kept
    assert len(kept) <= 2 * len(subjects.truth(one))
    again = faithfulness.measure(lm, one.clean, circuit=found, **subjects.options(one))
    assert float(again.faithfulness[0]) == pytest.approx(1, abs=discover.ENOUGH + 1e-3)
    at = int(np.argmax(found["size"].values >= len(kept)))
    assert float(found.null_faithfulness[at].max()) < 0.1
    assert float(found.faithfulness[-1]) == pytest.approx(1, abs=1e-4)  # every edge
    assert float(found.completeness[-1]) == pytest.approx(0, abs=1e-4)
    assert found["size"].values[-1] == found.attrs["of"]


def test_minimality_is_high_while_every_edge_is_needed():
    one, lm = subjects.everything()["induction"], subjects.lm_of("induction")
    found = discover.measure(lm, one.clean, **subjects.options(one))
    curve = dict(zip(found["size"].values.tolist(), found.minimality.values.tolist()))
    assert curve[4] > 0.5  # three of its four edges are the chain
    assert curve[110] < 0.3


@pytest.mark.parametrize("keep", ["greedy", "top", "threshold"])
def test_rules_and_limits(keep):
    one, lm = subjects.everything()["indirect_object"], subjects.lm_of("indirect_object")
    given = edge_attribution.measure(lm, one.clean, **subjects.options(one))
    effect = np.abs(given.effect.values[0])
    limit = float(np.sort(effect)[-9]) if keep == "threshold" else 9
    found = discover.measure(
        lm, one.clean, keep=keep, limit=limit, attribution=given, **subjects.options(one)
    )
    assert found.sizes["edge"] <= 9  # pruned
    assert graph.prune(subjects.pairs(found)) == subjects.pairs(found)
    assert (np.diff(np.abs(found.effect.values)) <= 0).all()
    strongest = [subjects.pairs(given)[i] for i in np.argsort(-effect)[:9]]
    if keep != "greedy":
        assert set(subjects.pairs(found)) == set(graph.prune(strongest))


def test_growth_takes_every_edge_once_each_into_what_reaches_the_logits():
    wires = edges.wiring(tiny.lm("llama"))
    order = graph.growth(
        wires, torch.rand(wires.mask.shape, generator=torch.Generator().manual_seed(0))
    )
    assert graph.first(wires, order, len(order)).equal(wires.mask)
    assert len(order) == len(wires.edges)
    reaching = {"logits"}
    for receiver, sender in order.tolist():
        assert graph.component(wires.receivers[receiver]) in reaching
        reaching.add(wires.senders[sender])


def test_bad_questions_are_refused():
    one, lm = subjects.everything()["induction"], subjects.lm_of("induction")
    for wrong, said in (
        ({"keep": "threshold"}, "threshold"),
        ({"limit": 0}, "above 0"),
        (
            {"attribution": discover.measure(lm, one.clean, **subjects.options(one))},
            "all 110 edges",
        ),
    ):
        with pytest.raises(InputError, match=said):
            discover.measure(lm, one.clean, **wrong, **subjects.options(one))
