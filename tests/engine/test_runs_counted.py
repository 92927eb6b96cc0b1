"""How often one measure reads its inputs and runs each prompt: numbers that may only fall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import intervene, replaced, scaled
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.heads import activation_patching, answer_suppression
from stratoscope.layers import back_patching
from stratoscope.models.lm import LM
from stratoscope.tokens import occlusion
from support import tiny

CLEAN, CORRUPT = [3, 14, 15, 92, 65], [3, 14, 16, 92, 65]


def counted(monkeypatch: pytest.MonkeyPatch, measure: Any) -> tuple[int, Counter[str]]:
    """How often a list was made a Batch, and how often each prompt went through the model."""
    lm, read, runs = tiny.lm("llama"), [], Counter[str]()
    batch, call = LM.batch, LM.__call__

    def reading(self: LM, inputs: Any, **options: Any) -> Any:
        if isinstance(inputs, list):
            read.append(inputs)
        return batch(self, inputs, **options)

    def running(self: LM, inputs: Any, **options: Any) -> Any:
        runs["clean" if inputs.ids[0].tolist() == CLEAN else "corrupt"] += 1
        return call(self, inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LM, "batch", reading)
        patch.setattr(LM, "__call__", running)
        measure(lm)
    return len(read), runs


def test_patching_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is read once. Clean: one pass, for logits and z. Corrupt: the same, which is what
    the sweep starts from too; a gradient (one prompt at a time, once the answer is known), and keys
    and values by the seam (see `engine.base`)."""
    read, runs = counted(
        monkeypatch,
        lambda lm: activation_patching.measure(lm, [CLEAN], corrupt=[CORRUPT], draws=2),
    )
    assert read == 2
    assert runs["clean"] == 1
    assert runs["corrupt"] <= 3


def test_occlusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is read once. Two of its passes end at the entry; the others choose answer and
    foil, and are what the sweep starts from."""
    read, runs = counted(monkeypatch, lambda lm: occlusion.measure(lm, [CLEAN]))
    assert read == 1
    assert runs["clean"] <= 5
    assert set(runs) == {"clean"}


@pytest.mark.parametrize(
    ("measure", "most"),
    # one pass for answer and scores, one for what is shown, two that the sweep starts from
    [(answer_suppression.measure, 4), (back_patching.measure, 4)],
)
def test_an_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, measure: Any, most: int) -> None:
    read, runs = counted(monkeypatch, lambda lm: measure(lm, [CLEAN]))
    assert read == 1
    assert runs == {"clean": most}


@pytest.mark.parametrize("what", ["enough", "another batch", "some positions", "too few sites"])
def test_a_sweep_runs_what_a_trace_lacks(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A trace of all that a sweep starts from spares it one run; any other is left alone."""
    lm = tiny.lm("llama")
    batch, cells = lm.batch([CORRUPT]), [replaced("layers.1.mlp.out", torch.ones(32), positions=2)]
    metric = lambda logits, example: logits[:, 5] - logits[:, 7]  # noqa: E731
    sites = ["layers.*.resid_pre", "layers.1.mlp.out", "layers.2.resid_post"]
    seen = capture(
        lm,
        lm.batch([CLEAN]) if what == "another batch" else batch,
        *sites[: 1 if what == "too few sites" else 3],
        positions=[0, 1] if what == "some positions" else None,
    )
    found = []
    _, runs = counted(
        monkeypatch, lambda lm: found.append(sweep(lm, batch, cells, metric, seen=seen))
    )
    assert runs["corrupt"] == (1 if what == "enough" else 2)
    assert torch.equal(found[0], sweep(lm, batch, cells, metric))


@contextmanager
def written_to(lm: LM) -> Iterator[None]:
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
        yield
        weight.copy_(before)


@contextmanager
def hooked(lm: LM) -> Iterator[None]:
    handle = lm.model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: 3.0 * out)
    try:
        yield
    finally:
        handle.remove()


CHANGES = {
    "intervention": lambda lm: intervene(lm, scaled("layers.0.mlp.out", 3.0)),
    "edit of weights": lambda lm: Edit(
        lm, (), {"model.layers.0.mlp.down_proj.weight": torch.ones(32, 48)}
    ),
    "weights written to": written_to,
    "a user's hook": hooked,
}


@pytest.mark.parametrize("ran", ["before", "within"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_trace_of_another_model_spares_a_sweep_nothing(change: str, ran: str) -> None:
    """What was seen without a change is no base within it, nor the other way round."""
    lm = tiny.lm("llama")
    batch, cells = lm.batch([CORRUPT]), [replaced("layers.1.mlp.out", torch.ones(32), positions=2)]
    metric = lambda logits, example: logits[:, 5] - logits[:, 7]  # noqa: E731
    look = lambda: capture(  # noqa: E731
        lm, batch, "layers.*.resid_pre", "layers.1.mlp.out", "layers.2.resid_post"
    )
    seen = look() if ran == "before" else None
    with CHANGES[change](lm):
        changed = sweep(lm, batch, cells, metric)
        if ran == "before":
            assert torch.equal(sweep(lm, batch, cells, metric, seen=seen), changed)
        seen = look()
    plain = sweep(lm, batch, cells, metric)
    assert torch.equal(sweep(lm, batch, cells, metric, seen=seen), plain)
    assert not torch.allclose(plain, changed)
