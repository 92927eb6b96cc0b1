"""Composition beyond chance: the null's moments against turned matrices, scores against
`heads.composition`, and a planted circuit that alone stands out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import composition, composition_null
from stratoscope.lab import planted
from stratoscope.maths.resample import bound
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, untouched

EXAMPLE = {"measure": {"inputs": [(1, 2), (1, 0)]}}


@pytest.mark.parametrize("spectra", [((1.0,), (1.0,)), ((3, 2, 1), (1, 1)), ((1, 1, 1), (5, 1, 1))])
def test_the_moments_are_those_of_matrices_turned_at_random(spectra) -> None:
    dim, draws = 9, 20_000
    s, t = (torch.tensor(x, dtype=torch.double) for x in spectra)
    g = torch.Generator().manual_seed(0)
    # rows of random orthonormal frames: any fixed reader, a writer turned
    frames = torch.linalg.qr(torch.randn(draws, dim, len(t), generator=g).double()).Q
    block = frames[:, : len(s)]
    scores = (s[:, None] * block * t).pow(2).sum(dim=(1, 2)) / (s @ s) / (t @ t)
    mean, spread = composition_null.moments(
        composition_null.shares(s), composition_null.shares(t), dim
    )
    assert mean == 1 / dim
    assert float(scores.mean()) == pytest.approx(mean, rel=0.03)
    assert float(scores.std()) == pytest.approx(float(spread), rel=0.03)


def test_scores_are_those_of_composition_and_z_is_by_hand() -> None:
    lm = lm_of("gpt2")
    with untouched(lm):
        found = composition_null.measure(lm)
    other = composition.measure(lm, ROWS)
    close(found.score.sel(edge=other.edge.values), other.score, 1e-4)
    assert len(found.impossible) + len(found.edge) == 12 * 12 * 3
    (q, k, v), o = composition.reads(lm), composition.writes(lm)
    for writer, reader, name, which in (
        ((0, 1), (2, 3), "L0H1 -> L2H3.k", "edge"),
        ((2, 0), (1, 3), "L2H0 -> L1H3.k", "impossible"),
    ):
        left, right = q[reader].T @ k[reader], o[writer] @ v[writer]
        score = (left @ right).norm() / left.norm() / right.norm()
        p, r = (torch.linalg.svdvals(m) ** 2 / m.norm() ** 2 for m in (left, right))
        mean, spread = composition_null.moments(p, r, 32)
        z = float((score**2 - mean) / spread)
        column = "z" if which == "edge" else "null_z"
        assert float(found[column].sel({which: name})) == pytest.approx(z, rel=1e-2, abs=1e-2)
    sides = np.array([str(n)[-1] for n in found.impossible.values])
    for side in "qkv":
        expected = bound(found.null_z.values[sides == side])
        assert float(found.bound.sel(side=side)) == pytest.approx(expected)
    some = composition_null.measure(lm, [(2, 3)])
    close(some.z, found.z.sel(edge=some.edge.values), 1e-5)


@pytest.mark.parametrize("p", [planted.induction(), planted.induction_gpt2()], ids=lambda p: p.name)
def test_the_planted_edge_is_found_beyond_every_impossible_one(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    found = composition_null.measure(lm)
    order = found.edge.values[np.argsort(-found.z.values)]
    assert str(order[0]) == "L0H1 -> L1H2.k"
    z = float(found.z.sel(edge="L0H1 -> L1H2.k"))
    noise = [n for n in found.impossible.values if "L0H1" not in n and "L1H2" not in n]
    assert z > 2 * float(found.null_z.sel(impossible=noise).max())
    assert z > 5 * float(found.bound.sel(side="k"))
    # heads of noise: as random matrices
    rest = [n for n in found.edge.values if not any(h in str(n) for h in ("L0H1", "L1H2", "L1H3"))]
    assert abs(float(found.z.sel(edge=rest).mean())) < 1


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="0 to 2 and 3"):
        composition_null.measure(lm, [(3, 0)])
    with pytest.raises(InputError, match="stands behind another"):
        composition_null.measure(lm, [(0, 0)])
    with pytest.raises(SiteError, match="not linear"):
        composition_null.measure(lm_of("qwen3"), [(1, 0)])
