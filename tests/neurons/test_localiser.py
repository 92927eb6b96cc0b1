"""neurons.localiser: t against SciPy's, states against plain hooks, a planted unit found first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from stratoscope.errors import InputError, SiteError
from stratoscope.neurons import localiser
from support import tiny
from support.subjects import ROWS, THREE, close, lm_of, untouched

EXAMPLE = {"measure": lambda case: {"other": case.references, "draws": 3, "share": 0.1}}

ONE = [[5, 9, 31, 7], [8, 40], [77, 2, 19], [61, 3, 3, 12, 44]]
OTHER = [[11, 12], [9, 8, 70], [50, 51, 52, 6]]


def plain(lm, row: list[int]) -> torch.Tensor:
    """The stream after every layer, by plain Transformers: (layer, position, dim). Of the last
    layer Transformers gives it after the final norm, which is taken out of the comparison."""
    with torch.no_grad():
        out = lm.model(torch.tensor([row]), output_hidden_states=True)
    return torch.cat(out.hidden_states[1:])


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_t_is_scipys_of_plain_hidden_states(name: str, pool: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        result = localiser.measure(lm, ONE, other=OTHER, pool=pool, share=0.1)
    rows = [
        np.stack([(x[:, -1] if pool == "last" else x.mean(dim=1)).double().numpy() for x in kind])
        for kind in ([plain(lm, row) for row in texts] for texts in (ONE, OTHER))
    ]
    expected = stats.ttest_ind(*rows, axis=0, equal_var=False).statistic
    assert np.abs(expected).max() > 2
    close(result.t[:-1], expected[:-1], 1e-4)
    close(result["mean"][:-1], np.concatenate(rows).mean(axis=0)[:-1], 1e-5)
    close(result.deviation[:-1], np.concatenate(rows).std(axis=0, ddof=1)[:-1], 1e-5)
    cut = np.sort(result.t.values.ravel())[-round(0.1 * result.t.size)]
    assert (result.chosen.values == (result.t.values >= cut)).all()


def test_welch_is_scipys_and_constants_are_no_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(9, 4, 5, generator=generator), torch.randn(6, 4, 5, generator=generator)
    two[:, 1] *= 30
    expected = stats.ttest_ind(one.double(), two.double(), axis=0, equal_var=False).statistic
    assert float(abs(localiser.welch(one, two) - torch.tensor(expected)).max()) < 1e-9
    flat = localiser.welch(torch.tensor([[1.0, 2.0, 3.0]] * 3), torch.tensor([[1.0, 1.0, 4.0]] * 2))
    assert flat.tolist() == [0.0, torch.inf, -torch.inf]


def test_the_largest_share() -> None:
    score = torch.tensor([[0.0, 3.0, -9.0], [3.0, 2.0, 1.0]])
    assert localiser.top(score, 0.5).tolist() == [[False, True, False], [True, True, False]]
    assert localiser.top(score, 0.01).sum() == 1
    assert localiser.top(score, 0.2)[0, 1]  # of equal ones the earlier


def test_a_planted_unit_is_first_and_the_larger_difference_is_not() -> None:
    """One dimension of the embedding is higher by 2 in half of the words, and hardly varies beside;
    in another all words differ thirty times as much."""
    lm, generator = tiny.lm("llama"), torch.Generator().manual_seed(1)
    weight = lm.model.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, 7] = 0.01 * torch.randn(len(weight), generator=generator)
        weight[40:80, 7] += 2
        weight[:, 9] = 60 * torch.randn(len(weight), generator=generator)
    try:
        rows = torch.randint(2, 40, (40, 4), generator=generator).tolist()
        high = [[*row[:-1], row[-1] + 39] for row in rows[:20]]
        result = localiser.measure(lm, high, other=rows[20:], seed=3)
        x = [localiser.states(lm, texts) for texts in (high, rows[20:])]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert int(result.t[0].values.argmax()) == 7
    assert float(result.t.max()) == pytest.approx(float(result.t[:, 7].max()))
    away = (x[0].mean(dim=0) - x[1].mean(dim=0)).abs()
    assert int(away[0].argmax()) == 9
    assert float(abs(result.null).max()) < 0.5 * float(result.t.max())


def test_shuffled_labels_pass_the_99_percent_point_in_one_of_a_hundred() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 4000, generator=generator)
    t = localiser.welch(x[:30], x[30:])
    share = float((t > stats.t.ppf(0.99, 58)).double().mean())
    assert abs(share - 0.01) < 3 * (0.01 * 0.99 / 4000) ** 0.5


def test_a_response_is_the_mean_of_deviations_of_the_chosen() -> None:
    lm = lm_of("gpt2")
    result = localiser.measure(lm, ONE, other=OTHER, share=0.1)
    x = localiser.states(lm, ROWS)
    z = (x.numpy() - result["mean"].values) / result.deviation.values
    close(localiser.response(x, result), z[:, result.chosen.values].mean(axis=1), 1e-5)
    every = torch.ones(result.t.shape, dtype=torch.bool)
    close(localiser.response(x, result, every), z.reshape(len(z), -1).mean(axis=1), 1e-5)
    own = torch.cat([localiser.states(lm, texts) for texts in (ONE, OTHER)])
    assert abs(float(localiser.response(own, result).mean())) < 1e-5


def test_another_site_and_what_cannot_be_asked() -> None:
    lm = lm_of("llama")
    result = localiser.measure(lm, ONE, other=OTHER, site="layers.*.mlp.act", draws=0)
    assert result.t.dims == ("layer", "neuron")
    assert result.null.shape == (0, *result.t.shape)
    with pytest.raises(SiteError, match="one vector"):
        localiser.states(lm, ONE, site="layers.*.attn.pattern")
    with pytest.raises(InputError, match="two or more of each"):
        localiser.measure(lm, ONE, other=OTHER[:1])
    with pytest.raises(InputError, match="choose 'last' or 'mean'"):
        localiser.measure(lm, ONE, other=OTHER, pool="first")
    with pytest.raises(InputError, match="share"):
        localiser.measure(lm, ONE, other=OTHER, share=1.0)
    with pytest.raises(InputError, match="same model and site"):
        localiser.response(localiser.states(lm, ONE), result)
