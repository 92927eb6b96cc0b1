"""The untrained twin: the weights that the class itself starts from, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stratoscope import models
from stratoscope.errors import InputError
from support import tiny

FAMILIES = ["smollm2", "gpt2", "vit", "llava"]


def held(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_those_that_the_class_makes_of_its_config(name: str) -> None:
    lm = models.wrap(tiny.model(name))
    before, state = held(lm.model), torch.get_rng_state()
    twin = models.untrained(lm, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    kind, config = tiny.CONFIGS[name]()
    torch.manual_seed(5)  # by hand, with torch's own random state
    plain = held(kind(config))
    found = held(twin.model)
    assert found.keys() == before.keys() == plain.keys()  # tied once, as it was
    assert all(torch.equal(found[n], plain[n]) for n in plain)
    assert not any(torch.equal(found[n], before[n]) for n in plain)
    assert type(twin.model) is type(lm.model)
    assert (twin.dims, twin.family, twin.layout.dims) == (lm.dims, lm.family, lm.layout.dims)
    assert not twin.model.training


def test_the_scale_is_the_configs_and_the_seed_decides() -> None:
    lm = tiny.lm("smollm2")
    torch.manual_seed(77)
    one, again, other = (held(models.untrained(lm, seed=s).model) for s in (1, 1, 2))
    scale = lm.model.config.initializer_range
    for name, weights in one.items():
        assert torch.equal(weights, again[name])
        if weights.ndim == 1:
            assert (weights == 1).all(), name  # norms
        else:
            assert not torch.equal(weights, other[name])
            # four standard errors of a deviation; PyTorch's own start is 0.1 here, five times that
            error = weights[weights != 0].std() / scale - 1  # the pad's row is 0
            assert abs(error) < 4 / (2 * weights.numel()) ** 0.5, name


def test_what_is_tied_dtype_kernel_tokenizer_and_name_are_kept() -> None:
    words = tiny.tokenizer([*"abcdefgh", "<pad>"])
    lm = models.wrap(tiny.model("smollm2").to(torch.bfloat16), words, name="mine")
    twin = models.untrained(lm, seed=3)
    assert twin.weight("embed").data_ptr() == twin.weight("logits").data_ptr()
    assert {p.dtype for p in twin.model.parameters()} == {torch.bfloat16}
    assert twin.tokenizer is words
    kept = {k: lm.provenance[k] for k in ("family", "dtype", "kernel", "device")}
    assert kept.items() <= twin.provenance.items()
    assert twin.provenance["model"] == "mine (untrained, seed 3)"
    assert twin.provenance["weights"] != lm.provenance["weights"]
    config = twin.model.config
    config.initializer_range = 0.7
    assert lm.model.config.initializer_range != 0.7  # its own


def test_a_model_that_is_not_what_its_config_makes_is_refused() -> None:
    model: Any = tiny.model("smollm2")
    lm = models.wrap(model)
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(
        InputError, match=r"`model.layers.1.mlp.up_proj.bias` is \(48,\) .* missing"
    ):
        models.untrained(lm)
