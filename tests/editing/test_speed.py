"""Speed: a model whose layers are slow is faster without them, by as much as they take; the cache
holds what is left."""

from __future__ import annotations

import time

import pytest
import torch

from stratoscope.editing import drop_modules, speed
from stratoscope.errors import InputError, SiteError
from stratoscope.models import wrap
from support import tiny
from support.subjects import ROWS, lm_of, untouched


def test_a_slow_attention_is_saved() -> None:
    """The attention of one layer waits 0.1 s: without it a text and a token are ready sooner by
    that, whatever else the machine does; the model beside itself is not."""
    lm = wrap(tiny.model("llama"))
    slow = lm.model.model.layers[1].self_attn
    plain = slow.forward

    def waiting(*args, **kwargs):
        time.sleep(0.1)
        return plain(*args, **kwargs)

    slow.forward = waiting
    edit = drop_modules.edit(lm, ["layers.1.attn.out"])
    with untouched(lm):
        found = speed.compare(lm, ROWS, edit, tokens=2, repeats=2)
    saved = found.seconds.sel(run="plain") - found.seconds.sel(run="edited")
    assert (saved > 0.05).all()
    assert (found.gain > 1.5).all()
    assert (abs(found.itself - 1) < 0.5).all()
    expected = found.seconds.sel(run="plain") / found.seconds.sel(run="edited")
    assert found.gain.values == pytest.approx(expected.values)


def test_bytes_of_the_cache() -> None:
    lm = lm_of("llama")
    edit = drop_modules.edit(lm, ["layers.0.attn.out"])
    found = speed.compare(lm, ROWS, edit, tokens=1, repeats=1)
    heads, width, layers = lm.model.config.num_key_value_heads, lm.dims.head_dim, lm.dims.layers
    for example, row in enumerate(ROWS):
        one = 2 * heads * width * len(row) * 4  # keys and values in float32
        assert found.cache.sel(run="plain")[example] == layers * one
        assert found.cache.sel(run="itself")[example] == layers * one
        assert found.cache.sel(run="edited")[example] == (layers - 1) * one


def test_the_edit_is_at_work_only_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text and its tokens run with the dropped module in two of three models."""
    lm, calls = lm_of("llama"), []
    hook = lm.model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    speed.compare(lm, ROWS[:1], drop_modules.edit(lm, ["layers.1.mlp.out"]), tokens=2, repeats=1)
    hook.remove()
    assert len(calls) == 2 * 2 * (1 + 2)  # models, repeats with the one that warms up, passes


def test_refusals() -> None:
    lm = lm_of("llama")
    edit = drop_modules.edit(lm, ["layers.1.attn.out"])
    with pytest.raises(InputError, match="another model"):
        speed.compare(wrap(tiny.model("llama")), ROWS, edit)
    with pytest.raises(InputError, match="at least one"):
        speed.compare(lm, ROWS, edit, repeats=0)
    bert = wrap(tiny.model("bert"))
    with pytest.raises(SiteError, match="with a cache"):
        speed.compare(bert, ROWS, drop_modules.edit(bert, ["layers.1.mlp.out"]))
    assert torch.is_grad_enabled()
