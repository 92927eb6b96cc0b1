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

EXAMPLE = {"measure": lambda case: {"other": case.lm, "penalty": 0.1, "ridge": 1e-3, "count": 3}}

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


def _texts(count: int = 30) -> list[list[int]]:
    return np.random.default_rng(5).integers(3, 96, size=(count, 12)).tolist()


def _seen(lm: cl.LM, layer: int, texts: list[list[int]]) -> np.ndarray:
    """What a layer's neurons do, by a plain hook: (token, neuron)."""
    return torch.cat([entering(lm, parts(lm, layer)[1], row) for row in texts]).double().numpy()


def _descent(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """The lasso's weights of one y, by coordinate descent without scikit-learn."""
    w, gram, right = np.zeros(x.shape[1]), x.T @ x / len(x), x.T @ y / len(x)
    for _ in range(300):
        for j in range(len(w)):
            free = right[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = np.sign(free) * max(abs(free) - penalty, 0) / gram[j, j]
    return w


def test_predictions_of_two_models_equal_plain_hooks_and_other_solvers() -> None:
    one, two = lm_of("llama"), wrap(tiny.model("llama", seed=1))
    texts = _texts()
    with untouched(one), untouched(two):
        found = cl.measure(one, texts, other=two, layers=[1], penalty=0.1, ridge=0.02)
    assert found.layer.values.tolist() == [1]
    a, b = _seen(one, 1, texts), _seen(two, 1, texts)
    half = len(a) // 2
    x, y = ((z - z[:half].mean(0)) / z[:half].std(0) for z in (b, a))
    # ridge as least squares with rows added
    rows = np.vstack([x[:half], np.sqrt(0.02 * half) * np.eye(48)])
    fit = np.linalg.lstsq(rows, np.vstack([y[:half], np.zeros((48, 48))]), rcond=None)[0]
    told = [np.corrcoef((x[half:] @ fit)[:, i], y[half:, i])[0, 1] for i in range(48)]
    close(found.subspace.values[0], np.array(told), 1e-3)
    for unit in (0, 7, 30):
        w = _descent(x[:half], y[:half, unit], 0.1)
        assert found.few_used.values[0, unit] == (w != 0).sum() > 0
        alike = np.corrcoef(x[half:] @ w, y[half:, unit])[0, 1]
        assert found.few.values[0, unit] == pytest.approx(alike, abs=1e-3)
    assert found.attrs["notes"] == ""
    short = cl.measure(one, texts[:4], other=two, layers=[1], ridge=0.02)
    assert "fitted to 24 tokens with 48 neurons" in short.attrs["notes"]


@torch.no_grad()
def test_a_model_in_another_basis_is_told_by_predictions_alone() -> None:
    """Of GPT-2's neurons before the nonlinearity any mixture is a neuron again: each of the other
    network is the sum, or the difference, of two of this one."""
    one, two = lm_of("gpt2"), wrap(tiny.model("gpt2"))
    order = np.random.default_rng(3).permutation(128).reshape(64, 2)
    turn = torch.zeros(128, 128)
    for number, (i, j) in enumerate(order):
        turn[[i, j], 2 * number] = 1.0
        turn[[i, j], 2 * number + 1] = torch.tensor([1.0, -1.0])
    layer = two.model.transformer.h[0].mlp.c_fc
    layer.weight.copy_(layer.weight @ turn)
    layer.bias.copy_(layer.bias @ turn)
    found = cl.measure(
        one,
        _texts(60),
        other=two,
        site="mlp.pre",
        layers=[0],
        penalty=0.02,
        ridge=1e-6,
        count=4,
    ).isel(layer=0)
    assert (found.subspace > 0.999).all()
    assert (found.few > 0.99).all()
    assert found.correlation.mean() < 0.9
    assert abs(found.null_subspace).mean() < 0.3
    assert abs(found.null_few).mean() < 0.3
    assert found.group_other.dims == ("other_neuron",)


@torch.no_grad()
def test_groups_of_two_models_hold_the_units_of_both() -> None:
    one, two = lm_of("llama"), wrap(tiny.model("llama"))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for layer in two.model.model.layers:
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            weight.copy_(weight[order].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order].clone())
    found = cl.measure(one, _texts(), other=two, count=6)
    partner = np.argsort(order.numpy())
    for row in range(3):
        assert (found.group.values[row] == found.group_other.values[row][partner]).all()
    close(found.group_share, np.full((3, 48), 0.5), 1e-9)
    assert abs(found.null_group_share - 0.5).mean() > 0.1


def test_compare_takes_any_two_networks() -> None:
    found = cl.compare(ONE, COPY, penalty=0.2, ridge=1e-3, count=24)
    assert found["partner"].tolist() == found["best"].tolist() == BACK.tolist()
    assert found["few"].min() > 0.98
    assert set(found["few_used"]) == {1}
    assert abs(found["null_subspace"]).max() < 0.3
    assert (found["group"] == found["group_other"][BACK]).all()
    rows = cl.compare(ONE[:, :5], COPY, ridge=1e-3)
    assert len(rows["partner"]) == len(rows["subspace"]) == 5
    assert "few" not in rows
    for options, said in (
        ({"penalty": 0.0}, "above 0"),
        ({"ridge": -1.0}, "above 0"),
        ({"count": 1}, "choose 2"),
        ({"count": 49}, "48 units"),
    ):
        with pytest.raises(InputError, match=said):
            cl.compare(ONE, COPY, **options)
    with pytest.raises(InputError, match="four are needed"):
        cl.compare(ONE[:3], COPY[:3], ridge=1.0)


def test_refusals() -> None:
    with pytest.raises(InputError, match="choose among 0 to 2"):
        cl.measure(lm_of("llama"), ROWS, other=lm_of("llama"), layers=[3])
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
