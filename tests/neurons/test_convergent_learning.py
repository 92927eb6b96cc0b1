"""A permuted, noisy copy of the units is found again by each of the four ways; a rotated one only
as a subspace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.models import wrap
from stratoscope.neurons import convergent_learning as cl
from support import tiny
from support.subjects import ROWS, close, entering, lm_of, padded, parts, untouched

EXAMPLE = {"measure": lambda case: {"other": case.lm}}

DICE = np.random.default_rng(0)
ONE = DICE.normal(size=(800, 24)) * DICE.uniform(0.1, 9, 24)
ORDER = DICE.permutation(24)  # unit j of the copy is unit ORDER[j]
BACK = ORDER.argsort()
COPY = 3 * ONE[:, ORDER] + 0.2 * ONE.std(0)[ORDER] * DICE.normal(size=ONE.shape) + 1
TURN = np.linalg.qr(DICE.normal(size=(24, 24)))[0]


def test_correlation() -> None:
    c = cl.correlation(ONE, COPY)
    close(c, np.corrcoef(ONE.T, COPY.T)[:24, 24:], 1e-9)
    still = ONE.copy()
    still[:, 3] = 0.1
    assert not cl.correlation(still, COPY)[3].any()
    with pytest.raises(InputError, match="the same ones"):
        cl.correlation(ONE[:1], COPY[:1])


def test_a_permuted_copy_is_found_exactly() -> None:
    c = cl.correlation(ONE, COPY)
    assert cl.matching(c).tolist() == cl.semi_matching(c).tolist() == BACK.tolist()
    assert cl.picked(c, BACK).min() > 0.99
    weights = cl.lasso(ONE, COPY, penalty=0.2)
    assert abs(weights).argmax(axis=1).tolist() == BACK.tolist()
    assert (weights != 0).sum() == 24
    assert cl.subspace(ONE, COPY).min() > 0.99


def test_one_to_one_and_one_for_several_differ() -> None:
    c = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert cl.matching(c).tolist() == [1, 0]  # 0.8 + 0.85 > 0.9 + 0.1
    assert cl.semi_matching(c).tolist() == [0, 0]
    assert cl.matching(np.array([[0.1], [0.7]])).tolist() == [-1, 0]
    assert np.isnan(cl.picked(np.array([[0.1], [0.7]]), np.array([-1, 0]))[0])


def test_a_rotation_is_one_subspace_but_not_the_same_units() -> None:
    one = cl.standardised(ONE)
    c = cl.correlation(one, one @ TURN)
    assert cl.picked(c, cl.matching(c)).mean() < 0.7
    assert cl.subspace(one, one @ TURN).min() > 0.999
    noise = DICE.normal(size=ONE.shape)
    assert abs(cl.subspace(one, noise).mean()) < 0.1


def test_lasso_finds_the_two_that_make_one() -> None:
    two = DICE.normal(size=(2000, 12))
    one = np.stack([two[:, 4] + two[:, 7], two[:, 0] - two[:, 9]], axis=1)
    weights = cl.lasso(one, two, penalty=0.1)
    assert [set(np.flatnonzero(row)) for row in weights] == [{4, 7}, {0, 9}]
    assert weights[1, 0] > 0 > weights[1, 9]
    # closed form for independent inputs: 1 / sqrt 2 less the penalty
    close(abs(weights[weights != 0]), np.full(4, 2**-0.5 - 0.1), 0.05)


def test_groups() -> None:
    causes = DICE.normal(size=(600, 3))
    own = [np.array([0, 0, 1, 1, 2, 2]), np.array([2, 1, 0, 2, 1, 0])]
    one, two = (causes[:, of] + 0.3 * DICE.normal(size=(600, 6)) for of in own)
    found = np.concatenate(cl.groups(one, two, count=3, seed=0))
    truth = np.concatenate(own)
    assert all(
        (found[i] == found[j]) == (truth[i] == truth[j]) for i in range(12) for j in range(12)
    )


@torch.no_grad()
def test_neurons_of_a_permuted_model_are_found() -> None:
    one = lm_of("llama")
    two = wrap(tiny.model("llama"))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for layer in two.model.model.layers:
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            weight.copy_(weight[order].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    with untouched(one), untouched(two):
        found = cl.measure(one, padded(ROWS, "left"), other=two)
    assert found.partner.dims == ("layer", "neuron")
    assert (found.partner == order.argsort().numpy()).all()
    assert (found.best == found.partner).all()
    close(found.correlation, np.ones((3, 48)), 1e-6)
    assert (found.null < 0.95).all()


def test_equals_plain_hooks() -> None:
    one, two = lm_of("llama"), wrap(tiny.model("llama", seed=1))
    found = cl.measure(one, ROWS, other=two, seed=3)
    for layer in range(3):
        a, b = (
            torch.cat([entering(lm, parts(lm, layer)[1], row) for row in ROWS]) for lm in (one, two)
        )
        c = np.corrcoef(a.T, b.T)[:48, 48:]
        close(found.best_correlation[layer], c.max(axis=1), 1e-4)
        partner = found.partner.values[layer]
        assert sorted(partner) == list(range(48))
        close(found.correlation[layer], c[np.arange(48), partner], 1e-4)
    assert (found.null.mean() < found.correlation.mean() + 0.05).item()


def test_refusals() -> None:
    with pytest.raises(InputError, match="both read the same ids"):
        cl.measure(lm_of("llama"), ROWS, other=_shallow())
    with pytest.raises(InputError, match=r"mlp\.act or mlp\.pre"):
        cl.measure(lm_of("llama"), ROWS, other=lm_of("llama"), site="resid_post")


def _shallow() -> cl.LM:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return wrap(hf.LlamaForCausalLM(config).eval())
