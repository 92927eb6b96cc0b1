"""What is predicted is what is taken: the bytes of tensors that live at the same time, counted
allocation by allocation."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from stratoscope.engine import memory, trace
from stratoscope.errors import MemoryRefusal
from stratoscope.heads import attention_pattern
from stratoscope.models import wrap


class Live(TorchDispatchMode):
    """Bytes of the storages made inside the block: how many live now, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if (
                storage is not None
                and storage._cdata not in given
                and storage._cdata not in self.held
            ):
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.held.values()))
        return out


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    return wrap(LlamaForCausalLM(config).eval())


PROMPTS = [[5] * 300, [7] * 250]


@pytest.mark.parametrize(
    "sites", [["layers.*.attn.pattern"], ["layers.2.attn.pattern"], ["layers.*.attn.scores"]]
)
def test_a_capture_of_attention_takes_what_was_predicted(lm, sites: list[str], monkeypatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(trace, "refuse_above", lambda needed, *_: told.append(needed))
    with Live() as live:
        seen = trace.capture(lm, PROMPTS, *sites)
    # below: what the process holds is more than what lives, as freed blocks of this size are kept
    # for the next layer
    assert told[0] * 0.55 <= live.peak <= told[0]
    assert live.peak > sum(seen[site].nbytes for site in seen.sites)


def test_patterns_are_held_once_beside_their_result(lm, monkeypatch) -> None:
    """Stacked, masked and copied they stood four times in memory, and were predicted once."""
    told: list[int] = []
    traces: list[trace.Trace] = []
    monkeypatch.setattr(attention_pattern, "refuse_above", lambda needed, *_: told.append(needed))
    monkeypatch.setattr(
        attention_pattern,
        "capture",
        lambda *asked: traces.append(trace.capture(*asked)) or traces[0],
    )
    with Live() as live:
        found = attention_pattern.measure(lm, PROMPTS)
    whole = found.values.nbytes
    assert live.peak + whole <= 1.2 * told[0] + whole  # numpy's copy is not torch's
    assert live.peak < 2.3 * whole
    assert not any(traces[0].reached(site) for site in traces[0].sites)  # let go of, layer by layer
    assert told[0] == pytest.approx(whole * (2 + 1 / 6))


def test_what_would_not_fit_is_refused_before_anything_runs(lm, monkeypatch) -> None:
    whole = 2 * 6 * 8 * 300 * 300 * 4
    monkeypatch.setattr(attention_pattern, "available", lambda _: 2 * whole)
    with pytest.raises(MemoryRefusal, match="these patterns would take"):
        attention_pattern.measure(lm, PROMPTS)
    monkeypatch.setattr(trace, "available", lambda _: whole)
    with pytest.raises(MemoryRefusal, match="capturing 6 sites"):
        trace.capture(lm, PROMPTS, "layers.*.attn.pattern")
    batch = lm.batch(PROMPTS)
    assert memory.working(lm, lm.sites("layers.*.mlp.out"), batch) == 0
    trace.capture(lm, PROMPTS, "layers.*.mlp.out")
