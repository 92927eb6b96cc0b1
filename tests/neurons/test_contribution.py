"""Neuron contributions find the planted neuron, add up to the MLP's attribution, and come from real
activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.layers import direct_logit_attribution
from stratoscope.models import wrap
from stratoscope.neurons import contribution
from support import tiny
from support.subjects import (
    ROWS,
    THREE,
    close,
    entering,
    lm_of,
    logits_with,
    padded,
    parts,
    untouched,
)

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
ONE_TOKEN = "adds up to logits, not to log probabilities"

OPTIONS = {"answer": 5, "foil": 60}


def test_planted_neurons() -> None:
    for p, strongest in ((planted.fact_lookup(), (1, 13)), (planted.two_hop(), (1, 13))):
        lm = wrap(p.model, p.tokenizer)
        with untouched(lm):
            found = contribution.measure(lm, p.clean, answer=p.answer, foil=p.foil)
        assert strongest in p.neurons
        values = found.contribution.values[0]
        assert divmod(int(values.argmax()), values.shape[1]) == strongest
        # written 2.0 of ANSWER, read out times 10, "unknown" untouched
        assert values[strongest] == pytest.approx(20, rel=0.02)
        assert float(found.activation[0][strongest]) == pytest.approx(8, rel=0.02)
        values[strongest] = 0
        assert abs(values).max() < 0.05


@pytest.mark.parametrize("name", [*THREE, "gpt_neox", "phi3", "olmo2", "gemma3", "opt"])
@torch.no_grad()
def test_sum_is_the_attribution_of_the_mlp(name: str) -> None:
    """Biases are taken out of the model first, so that nothing but neurons writes."""
    lm = lm_of(name)
    for key, value in lm.model.named_parameters():
        if key.endswith((".mlp.c_proj.bias", ".dense_4h_to_h.bias", ".fc2.bias")):
            value.zero_()
    found = contribution.measure(lm, ROWS, **OPTIONS)
    whole = direct_logit_attribution.measure(lm, ROWS, **OPTIONS)
    expected = whole.contribution[:, whole.kind == "mlp"]
    assert abs(expected).max() > 0.05
    close(found.contribution.sum("neuron"), expected, 1e-4)


@torch.no_grad()
def test_bias_is_the_rest() -> None:
    """GPT-2 with its biases: sum over neurons + bias == the MLP's entry, the bias by LayerNorm's
    own formula."""
    lm = lm_of("gpt2")
    found = contribution.measure(lm, [ROWS[0]], **OPTIONS)
    whole = direct_logit_attribution.measure(lm, [ROWS[0]], **OPTIONS)
    base = lm.model.transformer
    resid = entering(lm, base.ln_f, ROWS[0])[-1]
    towards = (lm.model.lm_head.weight[5] - lm.model.lm_head.weight[60]) * base.ln_f.weight
    deviation = (resid.var(unbiased=False) + base.ln_f.eps).sqrt()
    biases = [block.mlp.c_proj.bias for block in base.h]
    rest = [float(((b - b.mean()) / deviation) @ towards) for b in biases]
    assert max(map(abs, rest)) > 0.01
    close(
        found.contribution.sum("neuron")[0] + rest, whole.contribution[0, whole.kind == "mlp"], 1e-4
    )


@pytest.mark.parametrize("name", THREE)
def test_activation_equals_plain_hooks(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = contribution.measure(lm, ROWS, **OPTIONS)
    for example, row in enumerate(ROWS):
        expected = [entering(lm, parts(lm, layer)[1], row)[-1] for layer in range(3)]
        close(found.activation[example], torch.stack(expected), 1e-5)


@torch.no_grad()
def test_small_ablation_in_the_last_layer() -> None:
    """In the last layer nothing comes after but the final norm: turning a neuron down by a
    thousandth takes away its contribution, up to what the norm's scale changes, which contributions
    leave out on purpose."""
    lm, row = lm_of("llama"), ROWS[0]
    found = contribution.measure(lm, [row], **OPTIONS).contribution.values[0, -1]
    final = entering(lm, lm.model.model.norm, row)[-1].double()
    before, slopes = logits_with(lm, parts(lm, 2)[1], row, lambda x: None).double(), []
    down = parts(lm, 2)[1].weight.double()
    act = entering(lm, parts(lm, 2)[1], row)[-1].double()
    for neuron in range(48):
        lost = logits_with(
            lm, parts(lm, 2)[1], row, lambda x, n=neuron: x[-1, n].mul_(0.99)
        ).double()
        slope = float(((before - lost)[5] - (before - lost)[60]) / 0.01)
        # relative growth of the norm's scale
        scale = float((act[neuron] * down[:, neuron]) @ final / (final @ final))
        slopes.append(slope + scale * float(before[5] - before[60]))
    close(found, slopes, 5e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single(side: str) -> None:
    lm = lm_of("gemma2")
    found = contribution.measure(lm, padded(ROWS, side), **OPTIONS)
    for example, row in enumerate(ROWS):
        alone = contribution.measure(lm, [row], **OPTIONS)
        for variable in ("activation", "contribution"):
            close(found[variable][example], alone[variable][0], 1e-5)
    assert found.contribution.dims == ("example", "layer", "neuron")
    assert found.answer.values.tolist() == ["5", "5"]


def test_refusals() -> None:
    with pytest.raises(SiteError, match="mixture of experts"):
        contribution.measure(lm_of("mixtral"), ROWS)
    with pytest.raises(SiteError, match="not a sum"):
        contribution.measure(lm_of("bert"), ROWS)
    with pytest.raises(SiteError, match="no read-out"):
        contribution.measure(lm_of("bert_base"), ROWS)
    with pytest.raises(InputError, match="no tokens"):
        contribution.measure(lm_of("vit"), tiny.inputs("vit"))


def test_before_norm_is_the_transposed_map() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(6, generator=generator), torch.rand(2, generator=generator)
    towards, part = (torch.randn(2, 6, generator=generator) for _ in range(2))
    for centred in (False, True):
        norm = contribution.FrozenNorm(weight, torch.zeros(6), scale, centred)
        expected = (norm.linear(part) * towards).sum(dim=1)
        close((part * contribution.before_norm(norm, towards)).sum(dim=1), expected, 1e-6)
    assert not np.allclose(
        expected,
        (contribution.FrozenNorm(weight, weight, scale, False).linear(part) * towards).sum(1),
    )
