"""INLP: the first direction is a probe's own, directions are orthonormal and lead to chance, and
LEACE erases the same with less moved and less said otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.features import inlp, leace
from support.subjects import ROWS, close, lm_of, untouched

SITE = "layers.1.resid_post"
EXAMPLE = {
    "fit": lambda case: {
        "inputs": case.rows * 3, "labels": [0, 1] * 3, "site": SITE, "rounds": 2,
        "tokens": "every",
    },
    "edit": lambda case: {
        "request": inlp.fit(
            case.lm, case.rows * 3, labels=[0, 1] * 3, site="layers.0.resid_post", rounds=2,
            tokens="every",
        )
    },
}  # fmt: skip


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The kind lies along dimensions 0 and 1, twice as far along the first."""
    g = np.random.default_rng(seed)
    kinds = g.integers(0, 2, n)
    x = g.normal(size=(n, 8))
    x[:, 0] += 1.6 * (2 * kinds - 1)
    x[:, 1] += 0.8 * (2 * kinds - 1)
    return x - x.mean(axis=0), kinds


def test_the_first_direction_is_the_probe_s_and_all_are_orthonormal() -> None:
    from sklearn.linear_model import LogisticRegression

    x, kinds = drawn(800, 0)
    held = np.arange(600, 800)
    basis, accuracy = inlp.nullspaces(x, kinds, held, rounds=8, strength=1.0)
    plain = LogisticRegression(C=1.0, max_iter=2000).fit(
        x[:600] / np.sqrt((x**2).mean()), kinds[:600]
    )
    own = plain.coef_[0] / np.linalg.norm(plain.coef_[0])
    assert abs(own @ basis[0]) > 0.9999
    close(basis @ basis.T, np.eye(len(basis)), 1e-8)
    assert accuracy[0] > 0.9
    chance = np.bincount(kinds[held]).max() / 200
    assert accuracy[-1] <= inlp.sure(chance, 200)
    assert len(accuracy) == len(basis) + 1 < 8  # the last probe was told by chance, and stays
    assert inlp.nullspaces(x, kinds, held, rounds=1, strength=1.0)[0].shape == (1, 8)
    assert inlp.sure(0.5, 100) == pytest.approx(0.58225)


def test_leace_moves_less_for_the_same_blindness() -> None:
    """On correlated vectors, where a probe's direction is not the one the kind is written along."""
    g = np.random.default_rng(4)
    mix = g.normal(size=(8, 8))
    x, kinds = drawn(8000, 1)
    x = x @ mix
    z = torch.nn.functional.one_hot(torch.tensor(kinds[:4000])).double()
    mean = x[:4000].mean(axis=0)
    left, right = (part.numpy() for part in leace.closed_form(torch.tensor(x[:4000]), z))
    basis, _ = inlp.nullspaces(
        x[:4000] - mean, kinds[:4000], np.arange(3000, 4000), rounds=8, strength=1.0
    )
    moved = []
    for a, b in ((left, right), (basis.T, basis)):
        change = (x[4000:] - mean) @ b.T @ a.T
        after = x[4000:] - change
        probe = inlp.probe(after[:2000], kinds[4000:6000], 1.0)
        right_ones = probe.score(after[2000:], kinds[6000:])
        assert right_ones < inlp.sure(np.bincount(kinds[6000:]).max() / 2000, 2000)
        moved.append((change**2).sum())
    assert moved[0] < 0.8 * moved[1]


def test_fit_is_kept_untouched_and_refuses() -> None:
    lm = lm_of("llama")
    labels = [[i % 2 for i in range(len(row))] for row in ROWS * 4]
    given = {"labels": labels, "site": SITE, "tokens": "every"}
    with untouched(lm):
        one = inlp.fit(lm, ROWS * 4, rounds=3, **given)
    close(one.right @ one.right.T, torch.eye(one.rank), 1e-4)
    assert torch.equal(one.left, one.right.T)
    assert len(one.settings["accuracy"]) >= 1
    plain = inlp.fit(lm, ROWS * 4, rounds=3, centred=False, **given)
    assert float(plain.mean.abs().max()) == 0
    assert torch.equal(plain.right, one.right)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    close(plain(x), x - x @ one.right.T @ one.right, 1e-4)
    for more, said in (
        ({"rounds": 0}, "at least one round"),
        ({"held_out": 1.0}, "a share between 0 and 1"),
    ):
        with pytest.raises(InputError, match=said):
            inlp.fit(lm, ROWS * 4, **given, **more)
    with pytest.raises(InputError, match="left with none"):
        inlp.fit(lm, ROWS, labels=[0, 1], site=SITE, tokens="every", held_out=0.5)
