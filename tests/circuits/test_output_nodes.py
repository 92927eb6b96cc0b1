"""Output nodes: shares by hand, sums that must be exact, and the planted head that writes the
answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.circuits import output_nodes
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.maths import resample
from stratoscope.models import wrap
from support import tiny
from support.circuits import ASKED, CLEAN, CORRUPT, everything, lm_of, options

EXAMPLE = {
    "measure": lambda case: {
        "corrupt": case.corrupt,
        "answer": case.answer,
        "foil": case.foil,
        "nodes": ["L1H0", "L0H1"],  # which are the strongest is a mean over the examples
        "draws": 2,
    }
}
ONE_TOKEN = "adds up to logits, not to log probabilities"

WRITES = {
    "copy_head": "L1H3",
    "induction": "L1H2",
    "indirect_object": "L2H3",
    "fact_lookup": "L1 mlp",
}


def test_share_by_hand() -> None:
    start, end = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0])
    patched = torch.stack([start, end, torch.tensor([3.0, 2.0])])
    assert output_nodes.share(patched, start, end).tolist() == [0.0, 1.0, 0.5]
    back = torch.tensor([[1.0, 5.0]])  # the second pair is asked the other way round
    assert output_nodes.gone(back, start, end.flip(0) - 3).tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("name", WRITES)
def test_the_planted_writer_is_the_first_node(name: str) -> None:
    one, lm = everything()[name], lm_of(name)
    found = output_nodes.measure(lm, one.clean, **options(one), nodes=3)
    assert found.node.values[0] == WRITES[name]
    assert found.recovered[0] > 0.8
    assert found.null.shape == (3, 3)
    told = output_nodes.measure(lm, one.clean, **options(one), nodes=[WRITES[name]], draws=1)
    assert told.recovered.item() == pytest.approx(found.recovered[0].item(), abs=1e-5)


def test_direct_shares_are_the_final_norms_of_writes() -> None:
    """On a model without biases they and the embedding's share make up the whole difference."""
    lm = wrap(tiny.model("llama"))
    # the last tokens differ, so that the embedding shares
    clean = [[*row[:-1], 11 + n] for n, row in enumerate(CLEAN)]
    found = output_nodes.measure(lm, clean, corrupt=CORRUPT, **ASKED)
    towards = lm.weight("logits")[5] - lm.weight("logits")[9]
    part = []
    for rows in (clean, CORRUPT):
        final = capture(lm, rows, "layers.0.resid_pre", "layers.2.resid_post", positions=-1)
        norm = lm.layout.final_norm
        scale = torch.rsqrt(
            final["layers.2.resid_post"].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
        )
        part.append((final["layers.0.resid_pre"] * scale * norm.weight) @ towards)
    gap = found.clean_difference - found.corrupt_difference
    embed = (part[0] - part[1]).detach().numpy() / gap
    np.testing.assert_allclose(found.direct.sum("component") + embed, [1, 1], atol=1e-4)


def test_recovered_is_the_joint_patch() -> None:
    lm = wrap(tiny.model("gpt2"))
    nodes = ["L2H1", "L1 mlp", "L2H3"]
    found = output_nodes.measure(lm, CLEAN, corrupt=CORRUPT, **ASKED, nodes=nodes, draws=1)
    seen = capture(lm, CLEAN, "layers.2.attn.z", "layers.1.mlp.out", positions=-1)
    with intervene(
        lm,
        replaced(
            "layers.2.attn.z", seen["layers.2.attn.z"][:, None, [1, 3]], units=[1, 3], positions=-1
        ),
        replaced("layers.1.mlp.out", seen["layers.1.mlp.out"][:, None], positions=-1),
    ):
        logits = last_logits(lm, CORRUPT)
    moved = (logits[:, 5] - logits[:, 9]).numpy() - found.corrupt_difference
    expected = moved.sum() / (found.clean_difference - found.corrupt_difference).sum()
    assert found.recovered[-1].item() == pytest.approx(float(expected), abs=1e-4)
    way = found.clean_difference - found.corrupt_difference
    assert found.moved[:, -1].values == pytest.approx((moved * np.sign(way)).values, abs=1e-4)
    for k in range(3):
        again = resample.interval(found.moved[:, k], abs(way)).value
        assert again == pytest.approx(found.recovered[k].item(), abs=1e-5)
    every = output_nodes.measure(lm, CLEAN, corrupt=CORRUPT, **ASKED, nodes=15, draws=1)
    # all of them, in another order
    assert every.recovered[-1] == pytest.approx(every.null[0, -1].item(), abs=1e-4)


def test_the_null_may_be_patched_at_some_sizes_alone() -> None:
    lm = wrap(tiny.model("gpt2"))
    asked = {"corrupt": CORRUPT, **ASKED, "nodes": 6, "draws": 3}
    every = output_nodes.measure(lm, CLEAN, **asked)
    some = output_nodes.measure(lm, CLEAN, **asked, sizes=(2, 6))
    np.testing.assert_allclose(some.recovered, every.recovered, atol=1e-5)
    np.testing.assert_allclose(some.null[:, [1, 5]], every.null[:, [1, 5]], atol=1e-5)
    assert some.null[:, [0, 2, 3, 4]].isnull().all()
    assert len(np.unique(some.null[:, 5])) > 1  # a wrong order of draws is seen
    alone = output_nodes.measure(lm, CLEAN, **asked | {"draws": 0})
    assert alone.null.shape == (0, 6)
    np.testing.assert_allclose(alone.recovered, every.recovered, atol=1e-5)
    for sizes in ((0,), (7,)):
        with pytest.raises(InputError, match="1 to 6 nodes"):
            output_nodes.measure(lm, CLEAN, **asked, sizes=sizes)


def test_refusals() -> None:
    lm = wrap(tiny.model("gpt2"))
    for nodes, said in (
        (0, "1 to 15"),
        (16, "1 to 15"),
        (["L3H0"], r"L3H0.*run L0H0"),
        ([], "nodes"),
    ):
        with pytest.raises(InputError, match=said):
            output_nodes.measure(lm, CLEAN, corrupt=CORRUPT, **ASKED, nodes=nodes)
    with pytest.raises(SiteError, match="not a sum"):
        output_nodes.measure(wrap(tiny.model("bert")), CLEAN, corrupt=CORRUPT, **ASKED)


def test_share_of_ways_that_point_both_ways_does_not_cancel() -> None:
    # summed with signs, 1 would be all there is to go
    start, end = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])
    patched = torch.stack([end, start, torch.tensor([4.0, 3.0]), torch.tensor([0.0, 0.0])])
    assert output_nodes.share(patched, start, end).tolist() == pytest.approx(
        [1.0, 0.0, 4 / 7, 3 / 7]
    )


@pytest.mark.parametrize("name", WRITES)
def test_the_question_asked_the_other_way_round_has_the_same_nodes(name: str) -> None:
    """With answer and foil exchanged every difference is negative, and every share what it was."""
    one, lm = everything()[name], lm_of(name)
    plain = output_nodes.measure(lm, one.clean, **options(one), nodes=2, draws=1)
    asked = options(one) | {"answer": one.foil, "foil": one.answer}
    turned = output_nodes.measure(lm, one.clean, **asked, nodes=2, draws=1)
    assert turned.node.values[0] == WRITES[name]
    np.testing.assert_allclose(turned.direct, plain.direct, atol=1e-5)
    np.testing.assert_allclose(turned.recovered, plain.recovered, atol=1e-5)
    assert "1 of 1 pairs say the answer more on the corrupt prompt" in turned.attrs["notes"]
    assert "corrupt prompt" not in plain.attrs["notes"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_nodes_are_ranked_by_the_mean_of_direct_shares(family: str) -> None:
    """Also where pairs' differences have both signs, and one is far larger than the other."""
    lm = wrap(tiny.model(family))
    # each pair in the one and in the other direction, so that signs mix
    clean, corrupt = [CLEAN[0], CORRUPT[1], CLEAN[1]], [CORRUPT[0], CLEAN[1], CORRUPT[1]]
    found = output_nodes.measure(lm, clean, corrupt=corrupt, **ASKED, nodes=15, draws=1)
    gap = (found.clean_difference - found.corrupt_difference).values
    assert gap.min() < 0 < gap.max()
    shares = found.direct.mean("example").sel(component=found.node.values).values
    assert (np.diff(shares) <= 1e-7).all()
    assert shares.min() < 0  # by size, the order would be another
    assert not (np.diff(np.abs(shares)) <= 0).all()
