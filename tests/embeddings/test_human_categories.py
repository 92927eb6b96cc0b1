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
