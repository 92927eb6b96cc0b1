"""Dropping equals writing zeros on every architecture, computes nothing there, generates rightly,
and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.editing import drop_modules
from stratoscope.engine.edit import Edit
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models import LM, wrap
from support import tiny
from support.subjects import ROWS, lm_of, padded, untouched

EXAMPLE = {"edit": {"request": ["layers.1.mlp.out"]}}

DECODERS = (
    "llama",
    "gpt2",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "phi3",
    "opt",
    "olmo2",
    "qwen3",
    "mistral",
    "mixtral",
)
OTHERS = ("bert", "roberta", "distilbert", "modernbert", "vit", "llava", "qwen2_5_vl", "bloom")


@torch.no_grad()
def output(lm: LM, name: str) -> Tensor:
    found = lm(tiny.inputs(name))
    return (found["logits"] if "logits" in found else found[0]).clone()


def attributes(lm: LM) -> list[dict[str, Any]]:
    """What every module holds itself, weights left out: the numbering in the cache, and any
    `forward` of its own."""
    return [{k: v for k, v in vars(module).items() if k[0] != "_"} for module in lm.model.modules()]


@pytest.mark.parametrize("point", ["attn.out", "mlp.out"])
@pytest.mark.parametrize("name", DECODERS + OTHERS)
def test_equals_writing_zeros(name: str, point: str) -> None:
    lm, site = wrap(tiny.model(name)), f"layers.1.{point}"
    plain, before = output(lm, name), attributes(lm)
    with intervene(lm, ablate(site)):
        expected = output(lm, name)
    if (name, point) == ("bloom", "attn.out"):
        with pytest.raises(SiteError, match="adds the residual stream itself"):
            drop_modules.edit(lm, [site])
        return
    dropped = drop_modules.edit(lm, [site])
    assert attributes(lm) == before
    with dropped:
        found = output(lm, name)
    assert attributes(lm) == before
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(output(lm, name), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_nothing_is_computed(name: str) -> None:
    """What stands inside breaks when it is called; with the module dropped, nobody calls it."""
    lm = wrap(tiny.model(name))
    broken = [
        m
        for part in ("attn.out", "mlp.out")
        for m, _ in drop_modules._stubs(lm, lm.layout.resolve_one(f"layers.1.{part}"))
    ]
    inside = [m for module in broken for m in module.modules() if not list(m.children())]
    calls: list[int] = []
    hooks = [
        m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in inside if m not in broken
    ]
    with drop_modules.edit(lm, ["layers.1.attn.out", "layers.1.mlp.out"]):
        lm(ROWS)
    assert not calls
    lm(ROWS)
    assert bool(calls) == bool(hooks)
    for hook in hooks:
        hook.remove()


def test_without_both_modules_a_layer_is_gone() -> None:
    lm = lm_of("llama")
    with untouched(lm), drop_modules.edit(lm, ["layers.1.attn.out", "layers.1.mlp.out"]):
        found = last_logits(lm, padded(ROWS, "left"))
        seen = capture(lm, ROWS, "layers.1.resid_pre", "layers.1.resid_post")
    assert torch.equal(seen["layers.1.resid_pre"], seen["layers.1.resid_post"])
    del lm.model.model.layers[1]
    assert torch.allclose(found, last_logits(wrap(lm.model), ROWS), atol=1e-5)


@pytest.mark.parametrize("drop", [[0], [1], [0, 1], [2], [0, 2]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_neox", "opt"])
def test_generating_with_a_cache(name: str, drop: list[int]) -> None:
    """Token by token as without a cache; and the cache holds the attention that is left, no
    more."""
    lm = lm_of(name)
    sites = [f"layers.{layer}.attn.out" for layer in drop]
    with drop_modules.edit(lm, sites):
        found = generate(lm, ROWS, tokens=6, eos_token_id=-1)
        cache = lm.model(torch.tensor([ROWS[0]]), use_cache=True).cache
        assert sum(
            layer.keys is not None and layer.keys.numel() > 0 for layer in cache.layers
        ) == 3 - len(drop)
        assert cache.get_seq_length() == len(ROWS[0])
        for row, new in zip(ROWS, found):
            said = list(row)
            for _ in range(6):
                said.append(int(last_logits(lm, [said]).argmax()))
            assert said[len(row) :] == new.tolist()


def test_nested_and_after_an_error() -> None:
    lm = lm_of("llama")
    before = attributes(lm)
    one, two = (drop_modules.edit(lm, [f"layers.{layer}.attn.out"]) for layer in (0, 1))
    with drop_modules.edit(lm, ["layers.0.attn.out", "layers.1.attn.out"]):
        expected = last_logits(lm, ROWS)
    with untouched(lm), one, two:
        assert lm.model.model.layers[2].self_attn.layer_idx == 0
        assert torch.equal(last_logits(lm, ROWS), expected)
        with one:
            assert torch.equal(last_logits(lm, ROWS), expected)
    with untouched(lm), pytest.raises(KeyboardInterrupt), one:
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError, match="keep one"),
        one,
        drop_modules.edit(lm, ["layers.*.attn.out"]),
    ):
        pass
    assert attributes(lm) == before


def test_save_and_load(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    made = drop_modules.edit(lm, ["layers.2.mlp.out", "layers.0.attn.out"])
    made.save(tmp_path / "edit.safetensors")
    with made:
        expected = last_logits(lm, ROWS)
    for kind in (Edit, drop_modules.Drop):
        with kind.load(lm, tmp_path / "edit.safetensors"):
            assert torch.equal(last_logits(lm, ROWS), expected)
    assert made.note == "without layers.2.mlp.out, layers.0.attn.out"


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in ([], "layers.0.attn.out"):
        with pytest.raises(InputError, match="named as sites"):
            drop_modules.edit(lm, wrong)
    with pytest.raises(InputError, match="no module to drop"):
        drop_modules.edit(lm, ["layers.0.attn.z"])
    with pytest.raises(SiteError, match="layer 3 of 3"):
        drop_modules.edit(lm, ["layers.3.attn.out"])
