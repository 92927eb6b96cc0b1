"""Token influence: a closed form for linear mixers, PyTorch's own Jacobian for attention, and an
estimate that holds its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.architectures.vision import metaformer, pooling
from stratoscope.errors import InputError, SiteError
from stratoscope.layers import token_influence
from stratoscope.models import wrap
from support import tiny

EXAMPLE = {"measure": {"probes": 4}}

PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 7]]
ONE = {"image_size": 16, "num_labels": 5, "stages": [{"depth": 2, "dim": 8, "patch": 4}]}


def pictures() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def test_a_linear_mixer_has_its_closed_form() -> None:
    """written = P read W: |P| times the norm of W; and the estimate strays as far as it says."""
    generator = torch.Generator().manual_seed(0)
    p, w = torch.randn(80, 3, generator=generator), torch.randn(6, 6, generator=generator)
    read = torch.randn(1, 3, 6, generator=generator, requires_grad=True)
    written = torch.einsum("qk,ekd,dc->eqc", p, read, w)
    norm, error = token_influence.jacobian_norms(written, read)
    expected = (p.abs() * w.norm()).double()[None]
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)
    assert float(error.abs().max()) == 0
    signs = 2.0 * torch.randint(2, (80, 100, 6), generator=generator) - 1
    norm, error = token_influence.jacobian_norms(written, read, signs)
    off = ((norm - expected) / error).abs()
    assert float(off.max()) < 4.5
    assert 0.85 < float((off < 2).double().mean()) < 1  # of 80 queries, each with its own signs


def test_pooling_is_its_pattern_and_a_picture_has_no_padding() -> None:
    lm = wrap(metaformer.build(**ONE | {"layer_scale": 0.5}))
    got = token_influence.measure(lm, pictures())
    pattern = pooling.Mixer(8, (4, 4)).pattern(torch.zeros(1, 16, 8)).abs().numpy()
    expected = 0.5 * pattern * 8**0.5
    for example in got["influence"].values:
        for layer in example:
            np.testing.assert_allclose(layer, expected, atol=1e-6)
    assert got["mixer"].values.tolist() == ["mix.out"] * 2


# where each architecture's attention stands, and what it writes: as its own code names them
ATTENTION = {
    "llama": ("model.layers.{}.self_attn", ""),
    "gemma2": ("model.layers.{}.self_attn", "model.layers.{}.post_attention_layernorm"),
    "gpt2": ("transformer.h.{}.attn", ""),
    "gpt_neox": ("gpt_neox.layers.{}.attention", ""),
    "bert": (
        "bert.encoder.layer.{}.attention.self",
        "bert.encoder.layer.{}.attention.output.dense",
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_pytorchs_own_jacobian(name: str) -> None:
    lm = wrap(tiny.model(name))
    layer = lm.dims.layers - 1
    got = token_influence.measure(lm, PROMPTS[:1], layers=[-1], probes=0)["influence"]
    assert got.dims == ("example", "layer", "query", "key")
    # plain PyTorch: the model is run with the mixer's input replaced, by a hook of the test's own
    start, end = (path.format(layer) for path in ATTENTION[name])
    module, last = (lm.model.get_submodule(path) for path in (start, end or start))
    kept: list[torch.Tensor] = []

    def written(x: torch.Tensor | None) -> torch.Tensor:
        def begin(module, args, kwargs):
            given = args[0] if args else kwargs["hidden_states"]
            kept.append(given)
            if x is None:
                return None
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        out: list[torch.Tensor] = []
        handles = [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            last.register_forward_hook(
                lambda m, a, y: out.append(y[0] if isinstance(y, tuple) else y)
            ),
        ]
        lm.model(input_ids=torch.tensor(PROMPTS[:1]))
        for handle in handles:
            handle.remove()
        return out[0]

    written(None)
    jacobian = torch.autograd.functional.jacobian(written, kept[0].detach())[0, :, :, 0]
    expected = jacobian.permute(0, 2, 1, 3).flatten(2).norm(dim=-1)
    np.testing.assert_allclose(got.values[0, 0], expected.numpy(), rtol=2e-4, atol=1e-6)
    causal = lm.family.towers[""].causal
    assert (np.triu(got.values[0, 0], 1).max() < 1e-9) == causal


def test_padding_does_not_reach_it_and_an_estimate_is_seeded() -> None:
    lm = wrap(tiny.model("llama"))
    both = token_influence.measure(lm, PROMPTS, probes=8, seed=3)
    for number, prompt in enumerate(PROMPTS):
        alone = token_influence.measure(lm, [prompt], probes=8, seed=3)
        n = len(prompt)
        for name in ("influence", "error"):
            part = both[name].values[number, :, :n, :n]
            np.testing.assert_allclose(part, alone[name].values[0], rtol=1e-4, atol=1e-6)
    assert np.isnan(both["influence"].values[1, :, 3:]).all()
    assert np.isnan(both["influence"].values[1, :, :, 3:]).all()
    again = token_influence.measure(lm, PROMPTS, probes=8, seed=3)
    assert again.identical(both)
    other = token_influence.measure(lm, PROMPTS, probes=8, seed=4)
    assert not np.allclose(other["influence"].values[0], both["influence"].values[0])
    # and it strays from the exact norm as far as it says
    exact = token_influence.measure(lm, PROMPTS[:1], probes=0)["influence"].values
    many = token_influence.measure(lm, PROMPTS[:1], probes=200)
    off = np.abs(many["influence"].values - exact) / np.maximum(many["error"].values, 1e-12)
    seen = exact > 1e-9
    assert off[seen].max() < 5
    assert (off[seen] < 2).mean() > 0.8


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("llama")
    lm = wrap(model)
    flags = [p.requires_grad for p in model.parameters()]
    token_influence.measure(lm, PROMPTS, probes=2)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_cannot_be_asked_is_told() -> None:
    with pytest.raises(SiteError, match=r"layers\.0\.attn\.q` does not exist on bloom"):
        token_influence.measure(wrap(tiny.model("bloom")), PROMPTS)
    lm = wrap(tiny.model("llama"))
    with pytest.raises(InputError, match="probes=1"):
        token_influence.measure(lm, PROMPTS, probes=1)
    with pytest.raises(InputError, match=r"layers=\[9\]"):
        token_influence.measure(lm, PROMPTS, layers=[9])
    with pytest.raises(InputError, match="inference_mode"), torch.inference_mode():
        token_influence.measure(lm, PROMPTS)
    stages = [{"depth": 1, "dim": 4, "patch": 4}, {"depth": 1, "dim": 8, "patch": 2}]
    ragged = wrap(metaformer.build(**ONE | {"stages": stages}))
    with pytest.raises(SiteError, match="differ in how many positions"):
        token_influence.measure(ragged, pictures())
    wide = token_influence.measure(ragged, pictures(), layers=[1])
    assert wide["influence"].shape == (2, 1, 4, 4)
