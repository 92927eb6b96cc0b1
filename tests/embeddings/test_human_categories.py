"""Complexity and distortion against closed forms, clusters against planted kinds, and the model's
embeddings by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.embeddings import human_categories as hc
from stratoscope.errors import InputError
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": {}}


def heaps(count: int = 5, each: int = 30, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Kinds far from each other, and which is which."""
    generator = np.random.default_rng(0)
    labels = np.arange(count).repeat(each)
    return 10 * generator.normal(size=(count, dim))[labels] + generator.normal(
        size=(count * each, dim)
    ), labels


def test_complexity_by_hand() -> None:
    one, each = np.zeros(8, dtype=int), np.arange(8)
    assert hc.complexity(one) == pytest.approx(0)
    assert hc.complexity(each) == pytest.approx(3)
    # the entropy of 1/2, 1/4, 1/4
    assert hc.complexity(np.array([0, 0, 0, 0, 1, 1, 2, 2])) == pytest.approx(1.5)
    p = np.array([1, 3]) / 4
    assert hc.complexity(np.array([7, 3, 3, 3])) == pytest.approx(-(p * np.log2(p)).sum())


def test_distortion_by_hand() -> None:
    e = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0]])
    assert hc.distortion(e, np.array([0, 0, 1])) == pytest.approx(2 / 3)
    assert hc.distortion(e, np.arange(3)) == 0
    x, labels = heaps()
    s = hc.scaled(x)
    close(s.mean(axis=0) + 1, np.ones(8), 1e-9)
    assert hc.distortion(s, np.zeros(150, dtype=int)) == pytest.approx(1)
    between = ((np.stack([s[labels == k].mean(axis=0) for k in range(5)])) ** 2).sum(axis=1).mean()
    # within and between add up to the total
    assert hc.distortion(s, labels) == pytest.approx(1 - between)
    assert hc.objective(s, labels, beta=7.0) == pytest.approx(np.log2(5) + 7 * (1 - between))
    assert np.array_equal(hc.scaled(np.ones((3, 2))), np.zeros((3, 2)))


def test_planted_kinds_are_found() -> None:
    x, labels = heaps()
    found = hc.compare(x, labels)
    close(found["ami"], np.ones(5), 1e-9)
    assert np.abs(found["null_ami"]).max() < 0.15
    close(found["objective"], found["human_objective"], 1e-9)
    assert (found["null_objective"] > found["human_objective"] + 0.5).all()
    close(found["null_complexity"], found["human_complexity"], 1e-9)  # a shuffle keeps the sizes
    again = hc.compare(x, labels)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert not np.array_equal(hc.compare(x, labels, seed=1)["null_ami"], found["null_ami"])


def test_noise_has_no_kinds() -> None:
    x = np.random.default_rng(1).normal(size=(200, 10))
    found = hc.compare(x, np.arange(200) % 8)
    assert np.abs(found["ami"]).max() < 0.05
    # k-means wins this half by construction
    assert (found["distortion"] < found["human_distortion"]).all()


def test_savings_by_hand() -> None:
    """Four points on a line, cut in the middle by k-means and crosswise by the categories: as many
    bits, and all the variance more."""
    e, crosswise = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 1, 0, 1])
    x = hc.scaled(e)
    left = hc.distortion(x, crosswise) - hc.distortion(x, np.array([0, 0, 1, 1]))
    found = hc.savings(e, crosswise, betas=(1.0, 6.0), sizes=(1.0,))
    close(found[:, 0], [left / 3, 6 * left / 8], 1e-9)
    # one cluster saves the bit of the categories and pays with the variance that they leave
    one = hc.savings(e, np.array([0, 0, 1, 1]), betas=(4.0,), sizes=(0.5,))
    kinds = hc.distortion(x, np.array([0, 0, 1, 1]))
    assert one[0, 0] == pytest.approx((1 + 4 * kinds - 4) / 6)


def test_gaussian_kinds_keep_means_covariance_and_sizes() -> None:
    generator = np.random.default_rng(3)
    labels, mix = np.arange(4).repeat(500), generator.normal(size=(3, 3))
    e = 3 * generator.normal(size=(4, 3))[labels] + generator.normal(size=(2000, 3)) @ mix
    for lengths in (False, True):
        found = hc.gaussian(e, labels, generator, lengths=lengths)
        means = np.stack([e[labels == k].mean(axis=0) for k in range(4)])
        # 0.12 is the standard error
        close(np.stack([found[labels == k].mean(axis=0) for k in range(4)]), means, 0.4)
        rest = found - means[labels]
        if not lengths:  # they change it where there are few dimensions
            close(np.cov(rest.T), mix.T @ mix, 0.6)  # 3 % is the standard error
        far = [np.linalg.norm(x, axis=1) for x in (rest, e - means[labels])]
        assert (np.corrcoef(*far)[0, 1] > 0.99) == lengths
    # categories without sense come out all but on one spot, however few each has
    noise, few = generator.normal(size=(300, 20)), np.arange(300) % 60
    again = [hc.gaussian(noise, few, generator) for _ in range(5)]
    assert np.mean([hc.distortion(hc.scaled(x), few) for x in again]) == pytest.approx(
        0.8, abs=0.02
    )


def test_what_k_means_saves_counts_beyond_gaussian_kinds_only() -> None:
    """Noise and weak Gaussian kinds, on which clusters beat categories of nothing as well, stay
    inside the null; a second division that nobody named is beyond it."""
    generator = np.random.default_rng(5)
    labels = np.arange(120) % 8
    kinds = generator.normal(size=(8, 12))[labels] * 0.4 + generator.normal(size=(120, 12))
    hidden = kinds + 4 * generator.normal(size=(3, 12))[generator.integers(3, size=120)]
    inside = [hc.compare(x, labels, draws=4) for x in (generator.normal(size=(120, 12)), kinds)]
    for found in inside:
        assert found["saving"].mean() > 0
        assert abs(found["saving"].mean() - found["null_saving"].mean()) < 0.02
    found = hc.compare(hidden, labels, draws=4)
    assert found["saving"].min() > found["null_saving"].max()


def test_typicality_by_hand() -> None:
    e = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])
    found = hc.typicality(e, np.array([0, 0, 0, 1]))
    close(found, [1 / np.sqrt(10), 1 / np.sqrt(5), 3 / np.sqrt(10), np.nan], 1e-9)
    other = hc.typicality(e, np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    close(other, [4 / np.sqrt(17), 1 / np.sqrt(17), 3 / np.sqrt(10), 1 / np.sqrt(5)], 1e-9)


def test_it_reads_the_embedding_table() -> None:
    lm = lm_of("llama")
    rows = [*ROWS, [5, 6], [80, 2, 9]]
    with untouched(lm):
        found = hc.measure(
            lm, padded(rows, "left"), categories=["a", "b", "a", "b"], site="layers.0.resid_pre"
        )
    table = lm.model.get_input_embeddings().weight.detach()
    e = torch.stack([table[row].mean(dim=0) for row in rows]).numpy()
    expected = hc.compare(e, np.array([0, 1, 0, 1]))
    for name, values in expected.items():
        close(found[name] + 1, values + 1, 1e-5)
    alone = hc.measure(lm, rows)
    close(alone.complexity, np.full(5, 2.0), 1e-9)
    close(alone.distortion + 1, np.ones(5), 1e-9)


def test_refusals() -> None:
    with pytest.raises(InputError, match="one for each"):
        hc.measure(lm_of("llama"), ROWS, categories=["a"])
    with pytest.raises(InputError, match="ask for 1 to 3"):
        hc.clusters(np.ones((3, 2)), 4)
