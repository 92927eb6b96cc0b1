"""How often one measure reads its inputs and runs each prompt: numbers that may only fall."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

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
    """Each prompt is read once. Clean: one pass, for logits and z. Corrupt: the same, a
    gradient (one prompt at a time, once the answer is known), and what the sweep starts from."""
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
    assert runs["clean"] <= 4
    assert set(runs) == {"clean"}


@pytest.mark.parametrize(
    ("measure", "most"),
    # one pass for answer and scores, one for what is shown, one that the sweep starts from
    [(answer_suppression.measure, 3), (back_patching.measure, 3)],
)
def test_an_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, measure: Any, most: int) -> None:
    read, runs = counted(monkeypatch, lambda lm: measure(lm, [CLEAN]))
    assert read == 1
    assert runs == {"clean": most}
