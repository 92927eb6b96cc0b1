"""What is harvested equals plain hooks, token by token, without BOS and padding; a harvest that was
killed goes on and is the unbroken one; the model stops after the last site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine import harvest as module
from stratoscope.engine.harvest import Harvest, harvest
from stratoscope.errors import InputError, MemoryRefusal, ResultError, SiteError
from stratoscope.models import LM
from support import tiny

SITES = ("layers.0.mlp.out", "layers.1.attn.z")
RNG = torch.Generator().manual_seed(5)
TEXTS = [torch.randint(3, 96, (n,), generator=RNG).tolist() for n in (40, 7, 23, 1, 61)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows at a time, two such runs in a shard."""
    monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(module, "SHARD", 2)


def kept(lm: LM, **more: Any) -> Harvest:
    return harvest(lm, TEXTS, SITES, **({"tokens": 100, "context": 8, "seed": 4} | more))


@torch.no_grad()
def by_hooks(lm: LM, ids: list[int]) -> list[Tensor]:
    """MLP output of layer 0 and z of layer 1 of one window, by plain hooks."""
    seen: dict[int, Tensor] = {}
    blocks = lm.model.model.layers
    hooks = [
        blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.update({0: out[0]})),
        blocks[1].self_attn.o_proj.register_forward_pre_hook(
            lambda m, a: seen.update({1: a[0][0]})
        ),
    ]
    lm.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [seen[0][1:], seen[1][1:]]


@pytest.mark.usefixtures("few")
def test_equals_plain_hooks_without_bos_and_padding() -> None:
    lm = tiny.lm("llama")  # BOS is 1
    found = kept(lm)
    windows = found.window.unique(sorted=True).tolist()
    assert windows == list(range(len(windows)))
    assert found.left_out == len(windows)
    assert len(found.ids) == found.tokens == 100 == len(found[SITES[0]])
    for window in windows:
        here = found.window == window
        ids = found.ids[here].tolist()
        assert found.position[here].tolist() == list(range(len(ids)))
        assert any(ids == text[i : i + len(ids)] for text in TEXTS for i in range(0, len(text), 7))
        for site, expected in zip(SITES, by_hooks(lm, [1, *ids])):
            assert torch.allclose(found[site][here], expected, atol=1e-5)
    assert not (found.ids == 1).any()
    other = kept(lm, seed=5)
    assert not torch.equal(other.ids, found.ids)
    assert torch.equal(kept(lm).ids, found.ids)


@pytest.mark.usefixtures("few")
def test_every_token_once_where_all_are_asked_for() -> None:
    lm = tiny.lm("gpt2")
    bos = lm.model.config.bos_token_id
    found = harvest(lm, [[bos, *text] for text in TEXTS], SITES[:1], tokens=132, context=16)
    assert sorted(found.ids.tolist()) == sorted(token for text in TEXTS for token in text)


@pytest.mark.usefixtures("few")
def test_killed_and_gone_on_with_is_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, calls, run = tiny.lm("llama"), [], module._run

    def counted(*given: Any) -> dict[str, Tensor]:
        calls.append(given[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(module, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        kept(lm, folder=tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1
    broken = kept(lm, folder=tmp_path / "a")
    again = len(calls)
    whole = kept(lm)
    assert again - 4 == (len(calls) - again) - 2  # the two runs of the first shard were kept
    for site in SITES:
        assert torch.equal(broken[site], whole[site])
    for column in ("ids", "window", "position"):
        assert torch.equal(getattr(broken, column), getattr(whole, column))
    calls += [None] * 4
    count = len(calls)
    assert torch.equal(kept(lm, folder=tmp_path / "a").ids, whole.ids)
    assert len(calls) == count  # nothing was run
    with pytest.raises(ResultError, match="another harvest"):
        kept(lm, folder=tmp_path / "a", seed=9)


def test_the_pass_ends_at_the_last_site(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("layer 2 was run")

    monkeypatch.setattr(lm.model.model.layers[2].mlp, "forward", fail)
    assert kept(lm).tokens == 100
    with pytest.raises(AssertionError, match="layer 2"):
        harvest(lm, TEXTS, ["layers.2.mlp.out"], tokens=5)


def test_what_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match=r"133 tokens.*have 132"):
        kept(lm, tokens=133)
    with pytest.raises(InputError, match="context=1:"):
        kept(lm, context=1)
    with pytest.raises(InputError, match="tokens=0"):
        kept(lm, tokens=0)
    with pytest.raises(SiteError, match="one vector at each token"):
        harvest(lm, TEXTS, ["layers.0.attn.pattern"], tokens=5)
    with pytest.raises(InputError, match="was not harvested"):
        kept(lm)["layers.2.mlp.out"]
    monkeypatch.setattr(module, "available", lambda device: 1000)
    with pytest.raises(MemoryRefusal, match="this harvest would take"):
        kept(lm)
    assert kept(lm, folder=tmp_path).tokens == 100
