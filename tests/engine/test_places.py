"""What an MLP reads equals a plain hook's on its first module, in any family and padding; it is
what the model goes on with; a layer without neurons refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stratoscope.engine.harvest import harvest
from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.places import MLPInput, place, places, seen
from stratoscope.engine.saelens import hook_name
from stratoscope.errors import SiteError
from stratoscope.models import LM
from support.subjects import ROWS, lm_of, padded, untouched


def first(lm: LM, name: str) -> nn.Module:
    """Of layer 1, by Hugging Face's own names."""
    return {
        "llama": lambda: lm.model.model.layers[1].mlp.gate_proj,
        "gpt2": lambda: lm.model.transformer.h[1].mlp.c_fc,
        "opt": lambda: lm.model.model.decoder.layers[1].fc1,
    }[name]()


@torch.no_grad()
def given(lm: LM, module: nn.Module, row: list[int]) -> torch.Tensor:
    """What a module is given, as it takes it."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lm.model(torch.tensor([row]))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_equals_a_plain_hook(name: str) -> None:
    lm = lm_of(name)
    at = place(lm, "layers.1.mlp.in")
    with untouched(lm):
        found = seen(lm, padded(ROWS, "left"), at, *places(lm, ["layers.0.attn.z"]))[at]
    for row, x in zip(ROWS, found):
        alone = given(lm, first(lm, name), row)
        assert torch.allclose(x[: len(row)], alone.reshape(len(row), -1), atol=1e-5)
    kept = harvest(lm, ROWS, ["layers.1.mlp.in"], tokens=13)
    assert kept.sites == ("layers.1.mlp.in",)
    everything = torch.cat([x[: len(row)] for row, x in zip(ROWS, found)])
    if name == "llama":  # whose tiny rows have no BOS before them; a window has one
        assert kept["layers.1.mlp.in"].shape == everything.shape


def test_it_is_what_the_model_goes_on_with() -> None:
    lm = lm_of("llama")
    at = place(lm, "layers.1.mlp.in")
    plain = seen(lm, ROWS, at)[at]
    with intervene(lm, ablate("layers.0.mlp.out", units=[1, 2])):
        changed = seen(lm, ROWS, at)[at]
    assert float((changed - plain).abs().max()) > 1e-3
    norm = lm.model.model.layers[1].post_attention_layernorm
    stream = seen(lm, ROWS, *places(lm, ["layers.1.resid_mid"])).popitem()[1]
    assert torch.allclose(norm(stream)[0], plain[0], atol=1e-5)


def test_names() -> None:
    lm = lm_of("llama")
    assert [str(one) for one in places(lm, ["layers.*.mlp.in", "layers.0.mlp.out"])] == [
        "layers.0.mlp.out", *(f"layers.{n}.mlp.in" for n in range(lm.dims.layers)),
    ]  # fmt: skip
    assert isinstance(place(lm, "layers.2.mlp.in"), MLPInput)
    assert hook_name("layers.2.mlp.in") == "blocks.2.mlp.hook_in"
    with pytest.raises(SiteError, match="layer 9"):
        place(lm, "layers.9.mlp.in")
    with pytest.raises(SiteError, match="where one is needed"):
        place(lm, "layers.*.mlp.in")
    with pytest.raises(SiteError, match="expert"):
        place(lm_of("mixtral"), "layers.0.mlp.in")
