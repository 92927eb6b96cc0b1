"""The generalized discrimination value: closed forms, scipy's distances, what it must not see, and
a planted layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.layers import discrimination as d
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": {}}


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, dim)))


def clusters(
    classes: int, each: int, dim: int, width: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heaps of a given width round random centres, and the heap of each example."""
    labels = torch.arange(classes).repeat_interleave(each)
    return normal(classes, dim, seed + 1)[labels] + width * normal(
        classes * each, dim, seed
    ), labels


def by_scipy(x: torch.Tensor, labels: torch.Tensor) -> float:
    """The definition, pair by pair."""
    z = x.double().numpy()
    z = (z - z.mean(axis=0)) / (2 * z.std(axis=0))
    parts = [z[labels.numpy() == label] for label in np.unique(labels)]
    count = len(parts)
    intra = np.mean([pdist(part).mean() for part in parts])
    inter = sum(cdist(parts[i], parts[k]).mean() for i in range(count) for k in range(i + 1, count))
    return (intra - 2 * inter / (count * (count - 1))) / np.sqrt(x.shape[1])


def test_two_heaps_without_width_are_at_minus_one() -> None:
    labels = torch.tensor([0, 1] * 4)
    x = labels[:, None] * torch.tensor([3.0, -1.0, 1e4])
    assert d.generalized_discrimination(x, labels) == pytest.approx(-1)
    # every dimension is 1 apart, and there are three
    close(d.distances(x), (labels[:, None] != labels).double())
    uneven = torch.tensor([0] * 2 + [1] * 6)
    assert d.generalized_discrimination(uneven[:, None] * torch.ones(5), uneven) == pytest.approx(
        -1 / (2 * (0.25 * 0.75) ** 0.5)
    )


def test_by_hand() -> None:
    """Two classes on a line: 0, 2 and 4, 6; mean 3, deviation sqrt(5), so that distances shrink by
    2 sqrt(5)."""
    x, labels = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([7, 7, 3, 3])
    intra, inter = d.separation(d.distances(x), labels)
    assert (intra, inter) == pytest.approx((2 / 20**0.5, 4 / 20**0.5))
    assert d.generalized_discrimination(x, labels) == pytest.approx(-2 / 20**0.5)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_the_least_for_equal_classes(classes: int) -> None:
    """Corners of a simplex reach the bound of the docstring; heaps at random centres come near,
    never below."""
    bound = -((classes / (2 * (classes - 1))) ** 0.5)
    corners = torch.eye(classes).repeat_interleave(3, dim=0)
    labels = torch.arange(classes).repeat_interleave(3)
    assert d.generalized_discrimination(corners, labels) == pytest.approx(bound)
    x, labels = clusters(classes, 6, 400, width=1e-3)
    assert bound - 1e-9 <= d.generalized_discrimination(x, labels) < bound + 0.03


def test_is_the_definition_on_classes_of_any_size() -> None:
    x, _ = clusters(4, 10, 7, width=0.5)
    labels = torch.tensor([0] * 20 + [1] * 2 + [2] * 5 + [3] * 13)
    assert d.generalized_discrimination(x, labels) == pytest.approx(by_scipy(x, labels))
    assert d.generalized_discrimination(x.float(), labels) == pytest.approx(
        by_scipy(x, labels), abs=1e-6
    )


def test_noise_is_at_zero_in_any_dimension() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    for dim in (2, 50, 800):
        draws = [d.generalized_discrimination(normal(100, dim, seed), labels) for seed in range(10)]
        assert abs(np.mean(draws)) < 0.01


def test_what_it_must_not_see_and_what_it_must() -> None:
    x, labels = clusters(3, 15, 12, width=0.8)
    value = d.generalized_discrimination(x, labels)
    assert -0.8 < value < -0.2
    generator = np.random.default_rng(1)
    scale, shift = (torch.tensor(generator.normal(size=12) * by) for by in (30.0, 100.0))
    order, names = generator.permutation(12), torch.tensor([5, -2, 9])[labels]
    rows = generator.permutation(45)
    assert d.generalized_discrimination(x * scale + shift, labels) == pytest.approx(value)
    assert d.generalized_discrimination(x[:, order], names) == pytest.approx(value)
    assert d.generalized_discrimination(x[rows], labels[rows]) == pytest.approx(value)
    assert d.generalized_discrimination(torch.cat([x] * 3, dim=1), labels) == pytest.approx(value)
    more = [
        d.generalized_discrimination(*clusters(3, 15, dim, width=0.8)) for dim in (100, 400, 1600)
    ]
    assert np.ptp(more) < 0.05  # of one kind of data, the number of neurons does not matter
    assert (
        d.generalized_discrimination(torch.cat([x, normal(45, 12, 5)], dim=1), labels) > value + 0.1
    )


def test_dimensions_that_do_not_vary_count_as_nothing() -> None:
    x, labels = clusters(2, 8, 4, width=0.3)
    still = torch.full((16, 12), 0.1) + 1e-9 * normal(16, 12).float()  # float32 rounding
    with_them = d.generalized_discrimination(torch.cat([x.float(), still.float()], dim=1), labels)
    # sqrt(4 / 16)
    assert with_them == pytest.approx(d.generalized_discrimination(x, labels) / 2, abs=1e-6)
    assert d.generalized_discrimination(torch.ones(16, 3), labels) == 0


def test_shuffles_are_a_null_and_the_same_at_every_depth() -> None:
    x, labels = clusters(3, 20, 30, width=0.5)
    found = d.by_depth([x, normal(60, 9), x], labels, draws=50, seed=3)
    assert found["gdv"] == pytest.approx(
        [by_scipy(x, labels), by_scipy(normal(60, 9), labels), by_scipy(x, labels)]
    )
    assert found["gdv"] == pytest.approx(found["intra"] - found["inter"])
    assert found["null"].shape == (3, 50)
    assert np.array_equal(found["null"][0], found["null"][2])
    assert abs(found["null"].mean()) < 0.01
    assert found["gdv"][0] < found["null"].min() - 0.2


def test_the_class_appears_at_the_layer_that_writes_it() -> None:
    """All prompts end with the same word; layer 0 copies the name to it, layer 1 takes a third of
    that back."""
    p = planted.suppression()
    texts = {v.clean: v.answer for v in p.variants(400, seed=1)}
    names = sorted(set(texts.values()))[:4]
    chosen = [
        (text, name) for name in names for text in [t for t, of in texts.items() if of == name][:15]
    ]
    lm, labels = wrap(p.model, p.tokenizer), [name for _, name in chosen]
    found = d.measure(lm, [text for text, _ in chosen], labels=labels, position=-1, batch=7)
    [(layer, _)] = p.heads
    assert found.gdv.sel(depth=layer) == 0  # the embedding of one word
    assert found.gdv.sel(depth=layer + 1) < -0.3
    assert found.null_draws.quantile(0.05, "draw").sel(depth=layer + 1) > -0.1
    assert (found.null.values == found.null_draws.mean("draw").values).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("position", [-1, 2, None])
def test_equals_plain_hugging_face(name: str, position: int | None) -> None:
    lm, rows, kinds = (
        lm_of(name),
        [*ROWS, [5, 6, 7], [80, 2, 9, 31], [44, 45, 46]],
        ["a", "b", "a", "b", "b"],
    )
    with untouched(lm):
        found = d.measure(
            lm, padded(rows, "left"), labels=kinds, position=position, draws=4, batch=2
        )
    hidden = [
        lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows
    ]
    for depth in range(lm.dims.layers):  # the last of Hugging Face's has passed the final norm
        chosen = [
            h[depth][0].detach() if position is None else h[depth][0, [position]].detach()
            for h in hidden
        ]
        labels = torch.tensor(
            [kinds[i] == "b" for i, part in enumerate(chosen) for _ in part]
        ).long()
        assert float(found.gdv[depth]) == pytest.approx(
            by_scipy(torch.cat(chosen), labels), abs=1e-5
        )
    assert found.sizes == {"depth": lm.dims.layers + 1, "draw": 4}


def test_without_labels_each_input_is_a_class_of_tokens() -> None:
    lm = lm_of("llama")
    found = d.measure(lm, ROWS, draws=3)
    assert found.equals(d.measure(lm, ROWS, labels=[0, 1], draws=3))
    assert (
        found.attrs["settings"] != d.measure(lm, ROWS, labels=["x", "y"], draws=3).attrs["settings"]
    )
    assert not found.equals(d.measure(lm, ROWS, draws=3, seed=1))


def test_refusals() -> None:
    x, lm = normal(4, 3), lm_of("llama")
    for labels, wrong in (
        ([0, 0, 0, 0], "[4]"),
        ([0, 0, 0, 1], "[3, 1]"),
        ([0, 0, 1], "3 labels for 4"),
    ):
        with pytest.raises(InputError, match=wrong.replace("[", r"\[")):
            d.generalized_discrimination(x, torch.tensor(labels))
    with pytest.raises(InputError, match="1 labels for 2 inputs"):
        d.measure(lm, ROWS, labels=[1])
    with pytest.raises(InputError, match=r"classes of \[1, 1\]"):
        d.measure(lm, ROWS, position=-1)
    with pytest.raises(InputError, match="position 9 is outside"):
        d.measure(lm, ROWS, labels=[0, 1], position=9)


def test_shares_have_the_value_as_mean_and_its_spread_as_error() -> None:
    """The deviation of the value over fresh draws is what the shares say it is; counted once, it
    would be half as much within classes."""
    labels = torch.tensor([0] * 60 + [1] * 90 + [2] * 120)
    found, told = [], []
    for draw in range(200):
        x = normal(270, 6, seed=draw) + labels[:, None] * torch.tensor([0.5, 0, 0, 0, 0, 0])
        distance = torch.cdist(x.double(), x.double())
        intra, inter = d.separation(distance, labels)
        share = d.shares(distance, labels)
        assert share.mean() == pytest.approx(intra - inter, abs=1e-9)
        found.append(intra - inter)
        told.append(share.std(ddof=1) / 270**0.5)
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.12)
