"""Cells that cannot share run side by side in one forward pass, and say what each says alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine import packed, sweep
from stratoscope.engine.intervene import ablate, add, intervene, knock_out, replaced, scaled
from stratoscope.engine.trace import capture
from stratoscope.errors import MemoryRefusal
from stratoscope.models.lm import LM
from support import tiny

W = torch.linspace(-2, 2, 32)


def metric(logits: Tensor, example: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, logits.shape[1]) + 0.1 * example[:, None].to(logits)
    return (logits * weight).sum(dim=1)


def whole(name: str) -> list[Any]:
    """Cells that no model shares: scores, patterns, embeddings, and what follows the layers."""
    cells: list[Any] = [knock_out(layer, -1, key) for layer in range(3) for key in (-1, -2)]
    cells += [knock_out("*", -1, [-3]), add("embed", W, positions=-1, examples=[0])]
    cells += [scaled("layers.1.attn.pattern", 0.5, units=[0])]
    cells += [] if name == "bert" else [scaled("final_norm", 1.5, positions=-1)]
    cells += [[add("embed", W, positions=2), ablate("layers.1.mlp.out", positions=-1)]]
    return cells


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "bert"])
def test_cells_side_by_side_equal_those_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = tiny.lm(name), tiny.inputs("llama")
    cells = whole(name)
    expected = sweep.naive(lm, given, cells, metric)
    base = sweep.naive(lm, given, [[]], metric)
    counted: list[int] = []
    call = LM.__call__
    monkeypatch.setattr(
        LM, "__call__", lambda self, *a, **k: counted.append(1) or call(self, *a, **k)
    )
    got = sweep.sweep(lm, given, cells, metric)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert tiny.gap(got, expected) < 1e-4
    assert bool(((got - base).abs() > 1e-4).any(dim=1).all()), "a cell that changes nothing"
    assert len(counted) <= 3


def test_bloom_too_with_examples_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the seam cannot open."""
    lm, given = tiny.lm("bloom"), tiny.inputs("llama")
    other = capture(lm, [row[::-1] for row in given], "layers.1.resid_pre")["layers.1.resid_pre"]
    cells: list[Any] = [
        replaced("layers.1.resid_pre", other[:, [p]], positions=p) for p in range(5)
    ]
    cells += [replaced("layers.1.resid_pre", other[[1], :1], positions=[[0], [3]], examples=[1])]
    expected = sweep.naive(lm, given, cells, metric)
    torch.testing.assert_close(
        sweep.sweep(lm, given, cells, metric), expected, atol=1e-4, rtol=1e-4
    )
    one_by_one = sweep.sweep(lm, given, cells, metric, budget=40_000)
    torch.testing.assert_close(one_by_one, expected, atol=1e-4, rtol=1e-4)


def test_under_an_outer_change_they_run_alone() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    outer = add(
        "layers.0.mlp.out", torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    )
    cells = [knock_out(1, -1, 0), knock_out(2, -1, [0, 1])]
    with intervene(lm, outer):
        got, expected = (run(lm, given, cells, metric) for run in (sweep.sweep, sweep.naive))
    assert torch.equal(got, expected)


def test_a_wave_that_finds_no_memory_runs_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    cells = [add(f"layers.{n}.resid_pre", 1.0, positions=p) for n in range(3) for p in range(4)]
    expected, run = sweep.naive(lm, given, cells, metric), packed.Wave.run

    def small(most: int) -> Callable[..., Tensor]:
        def limited(self: packed.Wave, metric: Any) -> Tensor:
            if len(self.jobs) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return run(self, metric)

        return limited

    monkeypatch.setattr(packed.Wave, "run", small(12))
    got = sweep.sweep(lm, given, cells, metric)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(packed.Wave, "run", small(11))
    with pytest.raises(MemoryRefusal, match="12 cells at once do not fit"):
        sweep.sweep(lm, given, cells, metric)
