"""Relative representations do not see rotation or scale, and do see a shear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stratoscope.embeddings import relative_representations as rr
from stratoscope.errors import InputError
from support.subjects import ROWS, close, entering, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"anchors": case.references}}

ANCHORS = [[5, 6, 7], [80, 2, 9, 31], [44]]


def space(count: int = 200, dim: int = 6) -> Tensor:
    return (
        torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        + 0.5
    )


def rotation(dim: int, seed: int = 1) -> Tensor:
    x = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x).Q


def test_by_hand() -> None:
    x, anchors = (
        torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        torch.tensor([[2.0, 0.0], [0.0, -1.0], [4.0, 3.0]]),
    )
    close(rr.relative(x, anchors), [[0.6, -0.8, 0.96], [0, 0, 0]], 1e-6)


def test_invariance_and_its_limit() -> None:
    x = space()
    r = rr.relative(x, x[:20])
    for turned in (x @ rotation(6), x * 7.5, (x @ rotation(6, 2)) * 0.01, -x):
        close(rr.relative(turned, turned[:20]), r, 1e-10)
    shear = torch.eye(6, dtype=torch.float64)
    shear[0, 1] = 1.0
    for moved in (x @ shear, x + 1.0):
        assert (rr.relative(moved, moved[:20]) - r).abs().mean() > 0.05


def test_choose() -> None:
    centres = torch.eye(5).repeat_interleave(20, 0) * 3
    x = centres + 0.05 * torch.randn(100, 5, generator=torch.Generator().manual_seed(3))
    for how in ("farthest", "kmeans"):
        # one of each heap
        assert sorted((rr.choose(x, 5, how=how) // 20).tolist()) == [0, 1, 2, 3, 4]
    for how in ("uniform", "farthest", "kmeans", "first"):
        found = rr.choose(x, 30, how=how, seed=4)
        assert len(set(found.tolist())) == 30
        assert torch.equal(found, rr.choose(x, 30, how=how, seed=4))
    assert rr.choose(x, 3, how="first").tolist() == [0, 1, 2]
    # duplicates, each once
    assert sorted(rr.choose(torch.ones(6, 2), 6, how="farthest").tolist()) == list(range(6))
    for count in (0, 101):
        with pytest.raises(InputError, match="choose 1 to 100"):
            rr.choose(x, count)


def test_agreement() -> None:
    x = space(600)
    same = rr.agreement(x, x * 2)
    assert same["mrr"].min() == same["jaccard"].min() == 1
    close(same["cosine"], torch.ones(600), 1e-6)
    n = 600
    other = rr.agreement(
        x, space(600)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    )
    chance = sum(1 / rank for rank in range(1, n + 1)) / n
    assert abs(other["mrr"].mean() - chance) < 2 * chance
    assert other["jaccard"].mean() < 0.05
    turned = x @ rotation(6)
    absolute, relative = (
        rr.agreement(x, turned),
        rr.agreement(rr.relative(x, x[:50]), rr.relative(turned, turned[:50])),
    )
    assert absolute["mrr"].mean() < 0.1
    assert relative["mrr"].mean() > 0.999
    hand = rr.agreement(torch.eye(3), torch.eye(3)[[1, 0, 2]], top=1)
    assert hand["cosine"].tolist() == [0, 0, 1]
    assert hand["jaccard"].tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="must fit"):
        rr.agreement(x, x, top=601)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_equals_plain_hugging_face(pooling: rr.Pooling) -> None:
    lm = lm_of("llama")
    with untouched(lm):
        found = rr.measure(
            lm, padded(ROWS, "left"), anchors=padded(ANCHORS, "right"), pooling=pooling
        )
    take = {"mean": lambda x: x.mean(dim=0), "first": lambda x: x[0], "last": lambda x: x[-1]}[
        pooling
    ]
    x, a = (
        torch.stack([take(entering(lm, lm.model.model.norm, row)) for row in rows])
        for rows in (ROWS, ANCHORS)
    )
    expected = torch.stack(
        [torch.stack([torch.cosine_similarity(e, b, dim=0) for b in a]) for e in x]
    )
    close(found.relative, expected, 1e-5)
    assert found.relative.dims == ("example", "dim")
    assert found.anchor_text.values.tolist() == ["567", "802931", "44"]


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="needs example, position, dim"):
        rr.measure(lm, ROWS, anchors=ANCHORS, site="layers.0.attn.z")
