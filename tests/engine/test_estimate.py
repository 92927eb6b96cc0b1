"""What will take long is said before it starts, and small work is not even timed."""

from __future__ import annotations

import pytest

from stratoscope.engine import estimate
from stratoscope.engine.estimate import SlowWarning, announce
from stratoscope.models import wrap
from stratoscope.tokens import exchange, integrated_gradients, occlusion, shapley
from support import tiny

ROWS = [[3, 14, 15, 92, 65, 35], [38, 46, 26]]


def test_small_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "capture", lambda *_, **__: pytest.fail("timed"))
    lm = wrap(tiny.model("llama"))
    assert announce(lm, lm.batch(ROWS), 100, "this", "Wait.") == 0


def test_the_estimate_is_the_time_of_a_token_times_all_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = wrap(tiny.model("llama"))
    clock = iter([10.0, 10.6, 20.0, 20.6])
    monkeypatch.setattr(estimate, "_WORK", 0.0)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    batch = lm.batch(ROWS)
    said = r"this runs the model about 1,000 times over 9 tokens, about 15 minutes here. Wait."
    with pytest.warns(SlowWarning, match=said):
        # 0.1 s for each of the six tokens timed
        seconds = announce(lm, batch, 1000, "this", "Wait.")
    assert seconds == pytest.approx(900)
    assert announce(lm, batch, 60, "this", "Wait.") == pytest.approx(54)  # no warning


@pytest.mark.parametrize("method", [exchange, integrated_gradients, occlusion, shapley])
def test_methods_of_many_passes_foretell(method: object, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny.model("llama"))
    monkeypatch.setattr(estimate, "_WORK", 0.0)
    monkeypatch.setattr(estimate, "SLOW", 0.0)
    with pytest.warns(SlowWarning, match="runs the model about") as told:
        method.measure(lm, ROWS, answer=5, foil=60)
    assert len(told) == 1
