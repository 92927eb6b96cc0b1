"""Gradients against plain torch.autograd on the Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.gradients import frozen, gradients
from stratoscope.engine.intervene import add, scaled
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from support import tiny

PROMPTS = tiny.inputs("llama")
WHERE = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gemma2": "model.layers",
    "bert": "bert.encoder.layer",
}


def metric(logits: Tensor) -> Tensor:
    return logits[:, 5] - 2 * logits[:, 7]


def by_hand(name: str, layer: int) -> tuple[Tensor, Tensor]:
    """The metric at each last token, and its gradient with respect to what leaves a layer."""
    model, held = tiny.model(name), {}

    def hook(module: Any, args: Any, out: Any) -> None:
        held["x"] = out[0] if isinstance(out, tuple) else out

    model.get_submodule(f"{WHERE[name]}.{layer}").register_forward_hook(hook)
    logits = model(**tiny.arguments("llama")).logits
    value = metric(logits[torch.arange(2), torch.tensor([8, 4])])
    return value.detach(), torch.autograd.grad(value.sum(), held["x"])[0]


@pytest.mark.parametrize("name", WHERE)
def test_the_gradient_is_autograd_s(name: str) -> None:
    lm = tiny.lm(name)
    value, values, grads = gradients(
        lm, PROMPTS, ["layers.0.resid_post", "layers.1.resid_post"], metric
    )
    for layer in (0, 1):
        expected, gradient = by_hand(name, layer)
        site = lm.layout.resolve_one(f"layers.{layer}.resid_post")
        assert tiny.gap(value, expected) < 1e-5
        assert tiny.gap(grads[site], gradient) < 1e-4
        assert tiny.gap(values[site], capture(lm, PROMPTS, site)[site]) < 1e-6
        assert float(grads[site][1, 5:].abs().max()) == 0  # padding feels nothing


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "modernbert", "mixtral", "bloom"])
def test_every_site_against_finite_differences(name: str) -> None:
    """Where autograd by hand is clumsy (q, pattern, one half of a gate): move a little along the
    gradient."""
    lm = tiny.lm(name)
    points = [
        s for s in lm.sites() if s.layer == 1 and s.point not in ("attn.scores", "mlp.router")
    ]
    _, _, grads = gradients(lm, PROMPTS[:1], points, metric)
    for site in points:
        assert float(grads[site].norm()) > 1e-2, site
        direction = grads[site] / grads[site].norm()
        step = 1e-2
        up, down = (
            gradients(
                lm, PROMPTS[:1], [site], metric, interventions=[add(site, sign * step * direction)]
            )[0]
            for sign in (1, -1)
        )
        slope = float((up - down).sum()) / (2 * step)
        assert slope == pytest.approx(float(grads[site].norm()), rel=3e-2, abs=1e-3), site


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_embedding_s_gradient(name: str) -> None:
    model = tiny.model(name)
    table = model.get_input_embeddings()
    held = {}
    table.register_forward_hook(lambda m, a, out: held.update(x=out))
    logits = model(**tiny.arguments("llama")).logits
    [expected] = torch.autograd.grad(
        metric(logits[torch.arange(2), torch.tensor([8, 4])]).sum(), held["x"]
    )
    lm = tiny.lm(name)
    _, _, grads = gradients(lm, PROMPTS, ["embed", "layers.1.resid_pre"], metric)
    assert tiny.gap(grads[lm.layout.resolve_one("embed")], expected) < 1e-4


@pytest.mark.parametrize("name", tiny.VLMS)
def test_the_gradient_reaches_the_image(name: str) -> None:
    lm, given = tiny.lm(name), tiny.inputs(name)
    sites = ["projector", "vision.layers.1.resid_post", "layers.1.resid_post"]
    value, _, grads = gradients(lm, given, sites, metric)
    alone = gradients(lm, given, ["layers.1.resid_post"], metric)
    assert (
        tiny.gap(grads[lm.layout.resolve_one(sites[2])], alone[2][lm.layout.resolve_one(sites[2])])
        < 1e-5
    )
    assert tiny.gap(value, alone[0]) < 1e-5
    for site in sites[:2]:
        g = grads[lm.layout.resolve_one(site)]
        assert float(g.norm()) > 0
        step = 1e-2 * g / g.norm()
        up, down = (
            gradients(lm, given, [site], metric, interventions=[add(site, s * step)])[0]
            for s in (1, -1)
        )
        assert float((up - down).sum()) / 2e-2 == pytest.approx(float(g.norm()), rel=5e-2)


def test_a_start_replaces_what_enters() -> None:
    lm = tiny.lm("llama")
    entry = capture(lm, PROMPTS, "layers.0.resid_pre")["layers.0.resid_pre"]
    half = gradients(lm, PROMPTS, ["layers.0.resid_pre"], metric, start=0.5 * entry)
    scaled_entry = gradients(
        lm,
        PROMPTS,
        ["layers.0.resid_pre"],
        metric,
        interventions=[scaled("layers.0.resid_pre", 0.5)],
    )
    assert tiny.gap(half[0], scaled_entry[0]) < 1e-5
    whole = gradients(lm, PROMPTS, ["layers.0.resid_pre"], metric, start=entry)
    assert tiny.gap(whole[0], gradients(lm, PROMPTS, ["layers.0.resid_pre"], metric)[0]) == 0


def test_weights_take_no_gradient_and_keep_their_flags() -> None:
    lm = tiny.lm("gpt2")
    parameters = list(lm.model.parameters())
    parameters[3].requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    with frozen(lm):
        assert not any(p.requires_grad for p in parameters)
        gradients(lm, PROMPTS, ["layers.*.mlp.act"], metric)
    assert [p.requires_grad for p in parameters] == flags
    with torch.no_grad():  # works inside a user's no_grad
        gradients(lm, PROMPTS, ["layers.*.mlp.act"], metric)
    with pytest.raises(ZeroDivisionError):
        gradients(lm, PROMPTS, ["layers.*.mlp.act"], lambda logits: logits / (1 // 0))
    assert [p.requires_grad for p in parameters] == flags
    assert all(p.grad is None for p in parameters)
    parameters[3].requires_grad_(True)


def test_inference_mode_is_refused_with_a_sentence() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        gradients(tiny.lm("llama"), tiny.inputs("llama"), ["embed"], lambda logits: logits[:, 3])
