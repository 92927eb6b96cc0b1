"""Perplexity equals Hugging Face's own loss, with and without an edit, and its rise is by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.editing import drop_modules
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.errors import InputError, SiteError
from stratoscope.maths import resample
from stratoscope.models import wrap
from stratoscope.tokens import perplexity
from support import tiny
from support.subjects import ROWS, THREE, close, lm_of, padded, untouched

EXAMPLE = {
    "measure": lambda case: {"after": drop_modules.edit(case.lm, ["layers.1.mlp.out"])},
}


def plain_loss(model: torch.nn.Module, row: list[int]) -> float:
    ids = torch.tensor([row])
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_equals_hugging_faces_loss(name: str) -> None:
    lm = lm_of(name)
    edit = drop_modules.edit(lm, ["layers.1.mlp.out"])
    with untouched(lm):
        found = perplexity.measure(lm, padded(ROWS, "left"), after=edit)
    close(found.loss, torch.tensor([plain_loss(lm.model, row) for row in ROWS]), 1e-5)
    with intervene(lm, ablate("layers.1.mlp.out")):
        close(found.after, torch.tensor([plain_loss(lm.model, row) for row in ROWS]), 1e-5)
    assert (abs(found.after - found.loss) > 1e-3).all()
    assert found.predictions.values.tolist() == [len(row) - 1 for row in ROWS]


def test_pooled_over_predictions_by_hand() -> None:
    lm, rows = lm_of("llama"), [[3, 4, 5, 6, 7, 8], [9, 10]]
    found = perplexity.measure(lm, rows)
    assert "after" not in found
    found["loss"].values[:] = [1.0, 3.0]
    assert perplexity.perplexity(found) == pytest.approx(np.exp((5 * 1 + 3) / 6))
    with pytest.raises(InputError, match="after="):
        perplexity.rise(found)


def test_rise_and_its_interval() -> None:
    """Longer texts count for more, and the interval is that of the mean nats, turned into a
    part."""
    lm = lm_of("llama")
    rows = [list(range(3, 3 + n)) for n in (3, 5, 7, 9, 11, 13)]
    found = perplexity.measure(lm, rows, after=drop_modules.edit(lm, ["layers.0.attn.out"]))
    rise = perplexity.rise(found)
    pooled = perplexity.perplexity(found, "after") / perplexity.perplexity(found) - 1
    assert rise.value == pytest.approx(pooled, rel=1e-5)
    counts = found.predictions.values
    nats = resample.interval((found.after - found.loss).values * counts, counts)
    assert (rise.low, rise.high) == pytest.approx((np.expm1(nats.low), np.expm1(nats.high)))
    assert rise.low < rise.value < rise.high
    few = perplexity.measure(lm, rows[:2], after=drop_modules.edit(lm, ["layers.0.attn.out"]))
    assert np.isnan(perplexity.rise(few).low)  # two texts have no interval


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match=r"texts \[1\] have one token"):
        perplexity.measure(lm, [[3, 4], [5]])
    with pytest.raises(InputError, match="another model"):
        perplexity.measure(
            lm, ROWS, after=drop_modules.edit(wrap(tiny.model("llama")), ["layers.0.mlp.out"])
        )
    with pytest.raises(SiteError, match="does not predict"):
        perplexity.measure(wrap(tiny.model("bert")), ROWS)
