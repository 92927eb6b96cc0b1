"""The attention seam's arithmetic against closed forms."""

from __future__ import annotations

import pytest
import torch

from stratoscope.models import attention
from stratoscope.models.attention import looks_ahead, overheard
from stratoscope.models.sites import Site
from support import tiny, zoo

LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_a_mask_that_shows_a_single_later_key_looks_ahead(distance: int, kind: torch.dtype) -> None:
    shown = torch.ones(4, 4, dtype=torch.bool).tril()
    ahead = shown | torch.eye(4, dtype=torch.bool).roll(distance, dims=1).triu(1)
    for seen, expected in ((shown, False), (ahead, True)):
        mask = seen if kind == torch.bool else torch.where(seen, 0.0, LEAST)
        assert looks_ahead(mask[None, None]) == expected


def test_a_family_may_name_what_it_gives_its_attention() -> None:
    """AFMoE calls its kernel with `attention_mask=`; the listener hears it and changes nothing."""
    lm, heard = zoo.lm("afmoe"), []
    modules = [layer.self_attn for layer in lm.layout.layers[""]]
    plain = lm(zoo.prompts()).logits
    with overheard(lm.model, {m: lambda *given: heard.append(given) for m in modules}) as opened:
        assert opened
        assert torch.equal(lm(zoo.prompts()).logits, plain)
    assert len(heard) == len(modules)


def test_two_models_are_overheard_in_any_order() -> None:
    """As two threads do it: who stops first takes nothing from the other, and nothing stays."""
    one, two = tiny.lm("llama"), tiny.lm("qwen2")
    heard: list[str] = []
    local = attention.ALL_ATTENTION_FUNCTIONS._local_mapping
    before = dict(local)
    opened = []
    for name, lm in (("one", one), ("two", two)):
        at = lm.layout.attention(Site("", 0, "attn.q"))
        tell = lambda *given, name=name: heard.append(name)  # noqa: E731
        opened.append(attention.overheard(lm.model, {at: tell}))
        assert opened[-1].__enter__()
    opened[0].__exit__(None, None, None)
    for lm in (one, two):
        lm([[5, 6, 7]])
    assert heard == ["two"]
    opened[1].__exit__(None, None, None)
    assert dict(local) == before
    two([[5, 6, 7]])
    assert heard == ["two"]
