"""What neurons say in the vocabulary: the planted fact's word, and the formula by hand on three
architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.lab.planted.facts import CAPITALS, NEURON
from stratoscope.models import wrap
from stratoscope.neurons import vocabulary
from support.subjects import THREE, close, lm_of, parts, untouched

EXAMPLE = {"measure": {"inputs": [(0, 3), (1, 7), (1, 0)]}}

UNITS = [(2, 7), (0, 47), (1, 0), (0, 3)]


def test_planted_facts() -> None:
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = vocabulary.measure(lm, [(1, neuron) for neuron in NEURON.values()], top=3)
    assert found.promoted[:, 0].values.tolist() == list(CAPITALS.values())
    assert (found.promoted_logit[:, 0] > 9).all()
    assert (abs(found.promoted_logit[:, 1:]) < 0.1).all()
    assert found.neuron.values.tolist() == list(NEURON.values())
    assert found.layer.values.tolist() == [1] * 6


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_equals_the_formula(name: str) -> None:
    lm = lm_of(name)
    found = vocabulary.measure(lm, UNITS, top=96)  # the whole vocabulary, sorted
    head = lm.model.lm_head.weight
    for unit, (layer, neuron) in enumerate(UNITS):
        down = parts(lm, layer)[1].weight
        if name == "gpt2":
            write = down[neuron]
            logits = head @ ((write - write.mean()) * lm.model.transformer.ln_f.weight)
        elif name == "gemma2":
            post = lm.model.model.layers[layer].post_feedforward_layernorm.weight
            logits = head @ (down[:, neuron] * (1 + post) * (1 + lm.model.model.norm.weight))
        else:
            logits = head @ (down[:, neuron] * lm.model.model.norm.weight)
        best = logits.argsort(descending=True)
        close(found.promoted_logit[unit], logits[best], 1e-4)
        close(found.suppressed_logit[unit], logits[best.flip(0)], 1e-4)
        assert found.promoted[unit].values.tolist() == [str(int(i)) for i in best]
        assert found.suppressed[unit].values.tolist() == [str(int(i)) for i in best.flip(0)]


def test_units_do_not_depend_on_each_other() -> None:
    lm = lm_of("gemma2")
    together = vocabulary.measure(lm, UNITS)
    for unit, one in enumerate(UNITS):
        alone = vocabulary.measure(lm, [one])
        close(together.promoted_logit[unit], alone.promoted_logit[0], 1e-5)
        assert np.array_equal(together.promoted[unit], alone.promoted[0])
    assert vocabulary.measure(lm, [(-1, 3)]).layer.values.tolist() == [2]


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in ([(0, 48)], [(0, -1)], []):
        with pytest.raises(InputError, match="neuron"):
            vocabulary.measure(lm, wrong)
    with pytest.raises(SiteError, match="layer 3 of 3"):
        vocabulary.measure(lm, [(3, 0)])
    for top in (0, 97):
        with pytest.raises(InputError, match="choose 1 to 96"):
            vocabulary.measure(lm, UNITS, top=top)
    with pytest.raises(SiteError, match="mixture of experts"):
        vocabulary.measure(lm_of("mixtral"), [(0, 0)])
    with pytest.raises(SiteError, match="no linear way"):
        vocabulary.measure(lm_of("bert"), [(0, 0)])
    with pytest.raises(SiteError, match="vocabulary of tokens"):
        vocabulary.measure(lm_of("vit"), [(0, 0)])
