"""Planted directions are found by every kind that is learnt, as an untrained dictionary does not;
what is learnt is sparse as asked, and the same when it was killed and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stratoscope.engine import sparse, train
from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.sparse import Learner, learn
from stratoscope.errors import InputError

DIM, TRUE = 16, 24
ASKED = {"relu": 0.5, "topk": 3, "batchtopk": 3}


def planted(seed: int = 11, n: int = 4000) -> tuple[Tensor, Tensor]:
    """Vectors that are sums of few of 24 directions in 16 dimensions, about one constant, and the
    directions."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(TRUE, DIM, generator=rng)
    rows = rows / rows.norm(dim=1, keepdim=True)
    speaks = torch.rand(n, TRUE, generator=rng) < 0.1
    size = 1 + torch.rand(n, TRUE, generator=rng)
    return 5 * ((speaks * size) @ rows + 0.3), rows


def found(made: Dictionary, rows: Tensor) -> float:
    """Mean cosine of each true direction with a learnt one of its own."""
    written = made.W_dec / made.W_dec.norm(dim=1, keepdim=True)
    cosine = (rows @ written.T).numpy()
    one, other = linear_sum_assignment(-cosine)
    return float(cosine[one, other].mean())


def made(x: Tensor, kind: Any, steps: int = 600, **more: Any) -> Dictionary:
    given = {"width": 32, "sparsity": ASKED[kind], "batch_size": 256, "rate": 1e-2} | more
    return learn(x, kind=kind, steps=steps, site_in="layers.0.mlp.out", **given)


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk"])
def test_planted_directions_are_found(kind: Any) -> None:
    x, rows = planted()
    trained, untrained = made(x, kind), made(x, kind, steps=1, rate=1e-9)
    assert found(trained, rows) > 0.95
    assert found(untrained, rows) < 0.75
    other = planted(n=6000)[0][4000:]
    z = trained.encode(other)
    missed = (trained(other) - other).square().sum() / (other - x.mean(dim=0)).square().sum()
    assert float(missed) < (0.15 if kind == "topk" else 0.1)  # some have more than three
    few = float((z > 0).sum(dim=1).float().mean())
    assert 2 < few < (8 if kind == "relu" else 3.3)
    assert torch.allclose(trained.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)


def test_the_loss_is_the_formula() -> None:
    """Of topk and relu, on vectors with norms of sqrt(dim), no feature silent."""
    x, _ = planted(n=64)
    torch.manual_seed(0)
    for kind in ("relu", "topk"):
        learner = Learner(x, 32, kind, 2.0)
        pre = (x - x.mean(dim=0)) @ learner.W_enc
        z = pre.relu()
        if kind == "topk":
            z = z * (pre >= pre.topk(2, dim=1).values[:, 1:])
        missed = x - z @ learner.W_dec - x.mean(dim=0)
        expected = missed.square().sum(1).mean() * (1 + 1 / 32)
        expected = expected + (0.5 * 2.0 * z.sum(1).mean() if kind == "relu" else 0)
        assert torch.allclose(learner(x, 0.5), expected, rtol=1e-5)


def test_a_silent_feature_learns_from_what_is_missed() -> None:
    x, _ = planted(n=64)
    learner = Learner(x, 32, "topk", 2.0)
    with torch.no_grad():
        learner.b_enc[5] = -3.0
    learner.silent.fill_(0.0)
    learner.silent[5] = sparse.SILENT
    learner(x, 1.0).backward()
    awake = learner.W_dec.grad[5].clone()
    learner.zero_grad()
    learner.silent[5] = 0.0
    learner(x, 1.0).backward()
    with torch.no_grad():
        pre = (x - learner.b_dec) @ learner.W_enc + learner.b_enc
        spoke = bool((learner._chosen(pre.relu())[:, 5] > 0).any())
    assert spoke or (float(awake.norm()) > 0 and float(learner.W_dec.grad[5].norm()) == 0)
    along = (learner.W_dec.grad * learner.W_dec.detach()).sum(dim=1)
    assert float(along.abs().max()) < 1e-4


def test_killed_and_gone_on_with_is_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = planted(n=600)
    whole = made(x, "batchtopk", steps=20)
    real, run = train._step, []

    def step(*given: Any) -> float:
        run.append(given[2])
        if len(run) == 12:
            raise KeyboardInterrupt
        return real(*given)

    kept = train.train
    monkeypatch.setattr(sparse, "train", lambda *a, **k: kept(*a, **k | {"every": -1.0}))
    monkeypatch.setattr(train, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        made(x, "batchtopk", steps=20, folder=tmp_path)
    again = made(x, "batchtopk", steps=20, folder=tmp_path)
    assert run[12] == 11
    for name, value in whole.parts()[0].items():
        assert torch.equal(value, again.parts()[0][name]), name


@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_learnt_is_refused() -> None:
    x, _ = planted(n=300)
    for more, said in (
        ({"kind": "gated"}, "'gated' is not trained here"),
        ({"kind": "topk", "sparsity": 33}, "no more features than there are"),
        ({"kind": "relu", "sparsity": 0}, "sparsity above 0"),
        ({"kind": "topk", "batch_size": 301}, "a batch of 301"),
        ({"kind": "topk", "rate": 1e30}, "lower the rate"),
    ):
        with pytest.raises(InputError, match=said):
            learn(x, **{"width": 32, "steps": 8, "batch_size": 64, "sparsity": 3.0,
                        "site_in": "layers.0.mlp.out", **more})  # fmt: skip
