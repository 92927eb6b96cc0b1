"""layers.feature_variance: analytic shares, the mean of its null, coverage, planted words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.layers import concept_depth, feature_variance
from stratoscope.models import wrap
from support.cases import padded
from support.subjects import THREE, close, lm_of, untouched

EXAMPLE = {
    "measure": lambda case: {
        "inputs": padded(case.rows + case.turned, case.side) if case.rows else case.inputs,
        "labels": {"order": ["own", "own", "turned", "turned"]},
        "draws": 3,
        "components": 2,
    }
}
N = 4000


def two(generator: torch.Generator, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent labels of -1 and 1, balanced exactly, alone and together."""
    first = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(n // 4)
    second = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(n // 4)
    order = torch.randperm(n, generator=generator)
    return first[order], second[order]


def made(noise: float, n: int = N) -> tuple[torch.Tensor, dict[str, list[bool]]]:
    """3 f1 + 1 f2 + noise in ten dimensions, one direction for each: (example, depth=1, dim)."""
    generator = torch.Generator().manual_seed(0)
    f1, f2 = two(generator, n)
    ways = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0]
    x = 3 * f1[:, None] * ways[0] + f2[:, None] * ways[1]
    x = x + noise * torch.randn(n, 1, generator=generator) * ways[2]
    return x[:, None], {"large": (f1 > 0).tolist(), "small": (f2 > 0).tolist()}


def test_shares_are_the_analytic_ones_and_add_up() -> None:
    x, labels = made(noise=1.0)
    found = feature_variance.measure(lm_of("llama"), x, labels=labels, draws=0)
    spoilt = x[:, 0].var(dim=0, correction=0).sum() - 10  # of the noise as it was drawn
    expected = torch.tensor([9.0, 1.0]) / (10 + spoilt)
    close(found.explained.values[0], expected, 1e-3)
    assert float(found.together[0]) == pytest.approx(float(found.explained.sum()), abs=2e-3)
    close(found.unique.values, found.explained.values, 2e-3)
    doubled = feature_variance.measure(
        lm_of("llama"), x.repeat(1, 1, 2), labels=labels, draws=0, components=0
    )
    close(doubled.explained.values, found.explained.values, 1e-9)
    assert doubled.top.shape == (1, 0, 2)


def test_how_well_a_label_can_be_read_is_another_number() -> None:
    """Both labels are read without error; one is nine times the other. This is what would come out
    if labels were regressed on states instead."""
    x, labels = made(noise=0.0, n=200)
    found = feature_variance.measure(lm_of("llama"), x, labels=labels, draws=0)
    close(found.explained.values[0], [0.9, 0.1], 1e-6)
    left = torch.linalg.svd(x[:, 0].double(), full_matrices=False)[0][:, :2]
    for label in labels.values():
        y = torch.tensor(label).double() - 0.5
        assert float((left.T @ y).square().sum() / y.square().sum()) > 0.999


def test_dealt_out_labels_explain_columns_over_texts() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 2, 5, generator=generator)
    kinds = [number % 4 for number in range(60)]
    found = feature_variance.measure(lm_of("llama"), x, labels={"kind": kinds}, draws=400)
    null = found.null_explained.values[:, 0, 0]
    assert abs(null.mean() - 3 / 59) < 3 * null.std() / 20
    assert (found.null_explained.std("draw") > 0).all()
    assert found.attrs["seed"] == 0


def test_numbers_on_a_line_against_a_plain_regression_and_components_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 1, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 1])
    y = (x[:, 0, 0] + torch.randn(50, generator=generator)).double()
    kinds = ["a" if value > 0 else "b" for value in x[:, 0, 1].tolist()]
    labels = {"line": y.tolist(), "kind": kinds}
    found = feature_variance.measure(lm_of("llama"), x, labels=labels, components=3)
    away, line = x[:, 0].double() - x[:, 0].double().mean(dim=0), y - y.mean()
    fit = line[:, None] * (line @ away) / line.square().sum()
    whole = away.square().sum()
    close(found.explained.values[0, 0], fit.square().sum() / whole, 1e-9)
    means = torch.stack([away[[k == own for k in kinds]].mean(dim=0) for own in kinds])
    close(found.explained.values[0, 1], means.square().sum() / whole, 1e-9)
    both = torch.stack([line, torch.tensor([k == "a" for k in kinds]).double()], dim=1)
    both = torch.cat([both, torch.ones(50, 1)], dim=1)
    rest = away - both @ torch.linalg.lstsq(both, away).solution
    close(found.together.values[0], 1 - rest.square().sum() / whole, 1e-9)
    unique = found.together.values[0] - found.explained.values[0, ::-1]
    close(found.unique.values[0], unique, 1e-9)
    u, s, _ = np.linalg.svd(away.numpy(), full_matrices=False)
    close(found["size"].values[0], (s**2 / (s**2).sum())[:3], 1e-9)
    for rank in range(3):
        r = np.corrcoef(u[:, rank], y.numpy())[0, 1]
        assert found.top.values[0, rank, 0] == pytest.approx(r**2, abs=1e-9)


def test_an_interval_holds_the_share_of_the_population() -> None:
    generator, held = torch.Generator().manual_seed(3), 0
    labels = {"kind": [0, 1] * 40}
    sign = torch.tensor([-1.0, 1.0]).repeat(40)
    for _ in range(100):
        x = torch.randn(80, 1, 4, generator=generator)
        x[:, 0, 0] += sign
        found = feature_variance.measure(lm_of("llama"), x, labels=labels, draws=0, components=0)
        held += float(found.low[0, 0]) <= 1 / 5 <= float(found.high[0, 0])
    assert 87 <= held <= 100


@pytest.mark.parametrize("name", THREE)
def test_texts_are_read_at_their_last_token_at_every_depth(name: str) -> None:
    lm = lm_of(name)
    rows = [[5, 9, 31, 7], [8, 40], [77, 2, 19], [61, 3, 3, 12, 44], [4, 4, 9], [18, 5]]
    labels = {"kind": [0, 1, 1, 0, 1, 0]}
    with untouched(lm):
        found = feature_variance.measure(lm, rows, labels=labels)
    with torch.no_grad():
        hidden = [
            lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows
        ]
    for depth in range(lm.dims.layers):  # the last one Transformers gives after the final norm
        x = torch.stack([one[depth][0, -1] for one in hidden]).double()
        away, kind = x - x.mean(dim=0), torch.tensor(labels["kind"])
        means = torch.stack([away[kind == one].mean(dim=0) for one in kind.tolist()])
        expected = means.square().sum() / away.square().sum()
        close(found.explained.values[depth, 0], expected, 1e-4)


def test_a_planted_word_is_explained_after_the_layer_that_moves_it() -> None:
    """The names of two people are moved to the last token by one head."""
    p = planted.suppression()
    lm = wrap(p.model, p.tokenizer)
    texts = [v.clean for v in p.variants(2000, seed=1)]
    texts = [text for text in texts if len({*text.split()} & {"Finn", "Hana"}) == 1][:40]
    labels = {"who": ["Finn" in text.split() for text in texts]}
    found = feature_variance.measure(lm, texts, labels=labels)
    [(layer, _)] = p.heads
    null = found.null_explained.max("draw").values[:, 0]
    explained = found.explained.values[:, 0]
    assert explained[layer + 1] > 3 * null[layer + 1]
    assert explained[layer] <= max(null[layer], 0.2)
    again = feature_variance.measure(lm, concept_depth.states(lm, texts), labels=labels)
    assert np.array_equal(again.explained, found.explained)


def test_what_is_refused() -> None:
    lm, x = lm_of("llama"), torch.randn(8, 2, 3)
    for labels, words in (
        ({}, "at least one"),
        ({"a": [0, 1]}, "one for each"),
        ({"a": [1] * 8}, "the same for all 8"),
        ({"a": list(range(8))}, "would explain 100%"),
        ({"a": [0.5, float("nan")] * 4}, "not finite"),
    ):
        with pytest.raises(InputError, match=words):
            feature_variance.measure(lm, x, labels=labels)
    with pytest.raises(InputError, match=r"\(example, depth, dim\)"):
        feature_variance.measure(lm, x[0], labels={"a": [0, 1] * 4})
    with pytest.raises(InputError, match="0 or more"):
        feature_variance.measure(lm, x, labels={"a": [0, 1] * 4}, draws=-1)
