"""The benches compare what is comparable: the hand-written sweep and the batched loop compute what
the planner does."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from stratoscope.engine.sweep import naive

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("handwritten", "overhead", "gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("overhead")


@pytest.mark.parametrize(
    ("kind", "lengths"), [("resid", [7, 5, 4]), ("resid", [6]), ("heads", [6, 3])]
)
def test_all_ways_agree(bench: ModuleType, kind: str, lengths: list[int]) -> None:
    lm = bench.llama(
        "cpu",
        torch.float64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    work = bench.build(lm, kind, lengths, 0.3)
    true = naive(lm, work.batch, work.cells, bench.difference)
    assert len(true.unique()) >= len(work.cells)  # the patches make a difference
    for way in (
        work.planner,
        work.limit,
        lambda: work.limit(at_once=7),
        lambda: work.loop(group=5),
    ):
        torch.testing.assert_close(way(), true, atol=1e-6, rtol=0)


def test_the_script_for_a_gpu_runs(bench: ModuleType, tmp_path: Path) -> None:
    gpu, out = importlib.import_module("gpu"), tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--rows", "1B fp32", "--json", str(out)]
    result = CliRunner().invoke(gpu.main, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"1B fp32 18", "1B fp32 18 60% shared", "1B fp32 heads", "1B fp32 edges"}
    assert not any("error" in row for row in rows.values()), result.output
    assert rows["1B fp32 18"]["bars"]["planner = limit"]
