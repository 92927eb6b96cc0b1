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
from stratoscope.engine.learner import Learner
from stratoscope.engine.sparse import learn
from stratoscope.errors import InputError

DIM, TRUE = 16, 24
ASKED = {"relu": 0.5, "topk": 3, "batchtopk": 3, "jumprelu": 0.2, "gated": 2.0}


def speaking(n: int = 4000, seed: int = 12) -> Tensor:
    """Of 24 directions how much there is of each in n vectors: none of nine in ten."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(n, TRUE, generator=rng) < 0.1) * (1 + torch.rand(n, TRUE, generator=rng))


def planted(n: int = 4000) -> tuple[Tensor, Tensor]:
    """Vectors that are sums of few of 24 directions in 16 dimensions, about one constant, and the
    directions."""
    rows = torch.randn(TRUE, DIM, generator=torch.Generator().manual_seed(11))
    rows = rows / rows.norm(dim=1, keepdim=True)
    return 5 * (speaking(n) @ rows + 0.3), rows


def found(made: Dictionary, rows: Tensor) -> float:
    """Mean cosine of each true direction with a learnt one of its own."""
    written = made.W_dec / made.W_dec.norm(dim=1, keepdim=True)
    cosine = (rows @ written.T).numpy()
    one, other = linear_sum_assignment(-cosine)
    return float(cosine[one, other].mean())


def made(x: Tensor, kind: Any, steps: int = 600, **more: Any) -> Dictionary:
    given = {"width": 32, "sparsity": ASKED[kind], "batch_size": 256, "rate": 1e-2} | more
    return learn(x, kind=kind, steps=steps, site_in="layers.0.mlp.out", **given)


@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
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


def test_a_gate_without_its_own_loss_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is only paid for then, and shuts."""
    x, _ = planted()
    whole = made(x, "gated")
    monkeypatch.setattr(Learner, "auxiliary", lambda self, pre, wanted, weight: pre.sum() * 0)
    broken = made(x, "gated")
    other = planted(n=6000)[0][4000:]
    spread = (other - x.mean(dim=0)).square().sum()
    missed = [float((one(other) - other).square().sum() / spread) for one in (whole, broken)]
    assert missed[0] < 0.1
    assert missed[1] > 0.5


def test_a_jump_that_costs_nothing_stays_low() -> None:
    """Without its price a threshold has no reason to rise."""
    x, _ = planted()
    dear, cheap = made(x, "jumprelu"), made(x, "jumprelu", sparsity=1e-6)
    assert float(dear.threshold.mean()) > 4 * float(cheap.threshold.mean())


@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_a_transcoder_finds_what_is_written(kind: Any) -> None:
    """Few of 24 directions are read, and each writes one of its own, in another space."""
    x, _ = planted()
    rng = torch.Generator().manual_seed(3)
    written = torch.randn(TRUE, 20, generator=rng)
    written = written / written.norm(dim=1, keepdim=True)
    y = 5 * (speaking(4000) @ written + 0.3)
    sites = {"site_in": "layers.0.mlp.act", "site_out": "layers.0.mlp.out"}
    more = {"kind": kind, "width": 32, "sparsity": ASKED[kind], "batch_size": 256, "rate": 1e-2}
    one, untrained = (learn(x, y, steps=steps, **more, **sites) for steps in (600, 1))
    assert found(one, written) > 0.9
    assert found(untrained, written) < 0.75
    missed = (one(x) - y).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert float(missed) < 0.25
    assert torch.allclose(one.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)
    assert (one.site_in, one.site_out) == ("layers.0.mlp.act", "layers.0.mlp.out")


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
        ({"kind": "softplus"}, "'softplus': a dictionary is one of relu"),
        ({"y": x[:9]}, "300 vectors to read and 9 to write"),
        ({"kind": "gated", "sparsity": -1}, "sparsity above 0"),
        ({"kind": "topk", "sparsity": 33}, "no more features than there are"),
        ({"kind": "relu", "sparsity": 0}, "sparsity above 0"),
        ({"kind": "topk", "batch_size": 301}, "a batch of 301"),
        ({"kind": "topk", "rate": 1e30}, "lower the rate"),
    ):
        with pytest.raises(InputError, match=said):
            learn(x, **{"width": 32, "steps": 8, "batch_size": 64, "sparsity": 3.0,
                        "kind": "topk", "site_in": "layers.0.mlp.out", **more})  # fmt: skip
