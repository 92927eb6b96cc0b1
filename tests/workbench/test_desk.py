"""A model twice over the same weights, and who waits for whom."""

from __future__ import annotations

from threading import Event, Thread

import pytest
import torch

from stratoscope.heads import attention_pattern
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import next_token
from stratoscope.workbench.desk import OPEN, Cancelled, Desk, Lane, beside
from stratoscope.workbench.state import State


def test_the_second_has_its_own_modules_and_the_same_weights() -> None:
    truth = planted.copy_head()
    lm = wrap(truth.model, truth.tokenizer)
    other = beside(lm)
    pairs = list(zip(lm.model.named_parameters(), other.model.named_parameters()))
    assert all(a is b and m == n for (m, a), (n, b) in pairs)
    assert not set(map(id, lm.model.modules())) & set(map(id, other.model.modules()))
    a, b = (attention_pattern.measure(x, truth.clean) for x in (lm, other))
    assert (a.values == b.values).all()


def test_two_threads_at_once_get_what_one_alone_gets() -> None:
    truth = planted.fact_lookup()
    lm = wrap(truth.model, truth.tokenizer)
    lanes = (lm, beside(lm))
    alone = [attention_pattern.measure(lm, p).values for p in (truth.clean, truth.corrupt)]
    chances = next_token.measure(lm, truth.clean)["probability"].values
    wrong: list[str] = []

    def work(lane: int, prompt: str) -> None:
        for _ in range(25):
            if not (attention_pattern.measure(lanes[lane], prompt).values == alone[lane]).all():
                wrong.append("pattern")
            if (
                lane == 0
                and not (
                    next_token.measure(lanes[0], prompt)["probability"].values == chances
                ).all()
            ):
                wrong.append("chances")

    threads = [Thread(target=work, args=pair) for pair in ((0, truth.clean), (1, truth.corrupt))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_one_waits_for_the_other_and_can_be_cancelled() -> None:
    truth = planted.copy_head()
    lane, stop, waited = Lane(wrap(truth.model, truth.tokenizer)), Event(), []
    with lane.taken(Event()):
        stop.set()
        with pytest.raises(Cancelled), lane.taken(stop, lambda: waited.append(True)):
            pass
    assert waited == [True]
    with lane.taken(stop, lambda: waited.append(True)) as lm:  # free again, and nobody waits
        assert lm is lane.lm
    assert waited == [True]


def test_few_models_are_open_and_the_last_used_stay() -> None:
    truth, opened = planted.copy_head(), []

    def load(name: str):
        opened.append(name)
        return wrap(truth.model, truth.tokenizer)

    desk = Desk(["a", "b", "c"], load)
    assert OPEN == 2
    for name in ("a", "b", "a", "c", "a", "b"):
        desk.lanes(name)
    assert opened == ["a", "b", "c", "b"]
    state = State("a", "x", unit="L0H0")
    assert desk.made(state) is None
    assert desk.drawn(state) == []


def test_no_gradient_and_no_hook_is_left() -> None:
    truth = planted.copy_head()
    lm = wrap(truth.model, truth.tokenizer)
    beside(lm)
    assert all(p.grad is None for p in lm.model.parameters())
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
