"""Fidelity of an MLP's own neurons is whole, of the mean alone it is none; losses equal plain
transformers under plain hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.features import fidelity
from stratoscope.models import LM
from support.dictionaries import drawn, neurons
from support.subjects import ROWS, close, lm_of, padded, untouched

SITE = "layers.1.mlp.out"
BOS = 1
EXAMPLE = {
    "measure": lambda case: {
        "dictionary": drawn(case.lm.dims.dim, "layers.1.resid_post"),
        "reference": case.references,
    }
}


def constant(value: torch.Tensor) -> Dictionary:
    """It says one thing, whatever it reads; its three features fire at every token, never, and
    never."""
    bias = torch.tensor([99.0, -99.0, -99.0])
    return Dictionary(W_enc=torch.ones(32, 3) / 99, b_enc=bias, W_dec=torch.zeros(3, 32),
                      b_dec=torch.zeros(32), b_dec_out=value, site_in=SITE)  # fmt: skip


def test_an_mlp_s_own_neurons_recover_all() -> None:
    lm = lm_of("opt")
    with untouched(lm):
        found = fidelity.measure(lm, padded(ROWS, "left"), dictionary=neurons(lm, 1))
    assert float(found.fvu.max()) < 1e-8
    assert abs(float(found.increase)) < 1e-5
    for name in ("zero", "mean"):
        share, cost = found[f"recovered_{name}"], found[f"loss_{name}"] - found.loss
        assert np.isnan(share) or share == pytest.approx(1, abs=1e-5 / abs(float(cost.mean())))
    act = capture(lm, ROWS, "layers.1.mlp.act")["layers.1.mlp.act"]
    bos = lm.model.config.bos_token_id
    rows = [act[n, : len(row)][torch.tensor(row) != bos] for n, row in enumerate(ROWS)]
    close(found.l0, [float((x != 0).sum(1).float().mean()) for x in rows], 1e-5)
    close(found.firing, (torch.cat(rows) != 0).float().mean(dim=0), 1e-6)
    assert float(found.dead) == pytest.approx(float((found.firing == 0).mean()))


def test_the_mean_alone_recovers_nothing_of_it_and_zero_nothing_of_zero() -> None:
    lm = lm_of("llama")
    mean = capture(lm, ROWS, SITE).mean(SITE)
    found = fidelity.measure(lm, ROWS, dictionary=constant(mean))
    assert (found.l0 == 1).all()
    assert float(found.dead) == pytest.approx(2 / 3)
    assert found.firing.values.tolist() == [1, 0, 0]
    close(found.loss_spliced, found.loss_mean, 1e-6)
    there = torch.cat([capture(lm, [row], SITE)[SITE][0] for row in ROWS]).double()
    close(found.fvu, [1.0, 1.0], 1e-5)
    zero = fidelity.measure(lm, ROWS, dictionary=constant(torch.zeros(32)))
    close(zero.loss_spliced, zero.loss_zero, 1e-6)
    away = [x.square().sum() / (x - mean).square().sum()
            for x in there.split([len(row) for row in ROWS])]  # fmt: skip
    close(zero.fvu, torch.stack(away), 1e-5)
    assert fidelity.recovered(1.0, 1.5, 3.0) == 0.75
    assert np.isnan(fidelity.recovered(1.0, 1.5, 0.9))


@torch.no_grad()
def loss_by_hooks(lm: LM, row: list[int], change: Any) -> float:
    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        new = change(out)
        new[:, 0] = out[:, 0] if row[0] == BOS else new[:, 0]
        return new

    handle = lm.model.model.layers[1].mlp.register_forward_hook(hook)
    logits = lm.model(torch.tensor([row])).logits[0]
    handle.remove()
    return float(cross_entropy(logits[:-1], torch.tensor(row[1:])))


@pytest.mark.parametrize("first", [[BOS], []])
def test_losses_equal_plain_hooks_and_bos_stays_as_it_is(first: list[int]) -> None:
    lm, made = lm_of("llama"), drawn(32, SITE, kind="topk")
    rows = [[*first, *row] for row in ROWS]
    found = fidelity.measure(lm, padded(rows, "left"), dictionary=made)
    counted = torch.cat([capture(lm, [r], SITE)[SITE][0, len(first) :] for r in rows])
    mean = counted.mean(dim=0)
    arms = {
        "loss": lambda y: y.clone(),
        "loss_spliced": lambda y: made(y),
        "loss_zero": lambda y: torch.zeros_like(y),
        "loss_mean": lambda y: mean.expand_as(y).clone(),
    }
    for name, change in arms.items():
        close(found[name], [loss_by_hooks(lm, row, change) for row in rows], 1e-5)
    assert (found.l0 <= 5).all()
    assert found.predictions.values.tolist() == [len(row) - 1 for row in rows]
    counts, pooled = found.predictions.values, {}
    for name in arms:
        pooled[name] = float((found[name].values * counts).sum() / counts.sum())
    wanted = fidelity.recovered(pooled["loss"], pooled["loss_spliced"], pooled["loss_zero"])
    assert float(found.recovered_zero) == pytest.approx(wanted, rel=1e-4, nan_ok=True)


def test_what_cannot_be_measured_is_refused() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="two tokens"):
        fidelity.measure(lm, [[5]], dictionary=drawn(32, SITE))
    with pytest.raises(InputError, match=r"16 numbers a token.*has 32"):
        fidelity.measure(lm, ROWS, dictionary=drawn(16, SITE))
