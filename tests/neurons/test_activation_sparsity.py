"""Sparsity against closed forms (Gaussian, one neuron, ReLU at its start) and against plain
hooks."""

from __future__ import annotations

import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.models import wrap
from stratoscope.neurons import activation_sparsity as sparsity
from support import tiny
from support.subjects import ROWS, THREE, close, entering, lm_of, padded, parts, untouched

EXAMPLE = {"measure": {}}


def test_closed_forms() -> None:
    x = torch.randn(40, 20000, generator=torch.Generator().manual_seed(0))
    assert sparsity.participation(x).mean() == pytest.approx(1 / 3, abs=0.005)
    # half of them, as Gaussian
    assert sparsity.participation(x.relu()).mean() == pytest.approx(1 / 6, abs=0.005)
    assert sparsity.nonzero(x.relu()).mean() == pytest.approx(1 / 2, abs=0.005)
    assert sparsity.nonzero(torch.nn.functional.silu(x)).mean() == pytest.approx(1)
    one = torch.zeros(3, 8)
    one[0, 5], one[1] = -2.0, 0.25
    close(sparsity.participation(one), [1 / 8, 1, 0], 1e-6)
    close(sparsity.nonzero(one), [1 / 8, 1, 0], 1e-6)
    assert sparsity.is_above(torch.tensor([[1.0, -0.2, 0.1, 0.05, 0.0]]), 0.1).tolist() == [
        [True, True, False, False, False]
    ]
    assert not sparsity.is_above(one[2], 0.0).any()
    for scale in (1e-20, 1e15):  # fourth powers would leave float32's range
        close(sparsity.participation(x * scale), sparsity.participation(x), 1e-5)


@pytest.mark.parametrize("name", THREE)
def test_equals_plain_hooks(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = sparsity.measure(lm, padded(ROWS, "left"), threshold=0.2)
    acts = [[entering(lm, parts(lm, layer)[1], row) for layer in range(3)] for row in ROWS]
    large = lambda a: (a.abs() > 0.2 * a.abs().amax(dim=1, keepdim=True)).float()  # noqa: E731
    energy = lambda a: (a**2).sum(1) ** 2 / (48 * (a**4).sum(1))  # noqa: E731
    if name == "gpt2":
        energy = lambda a: (a**2).sum(1) ** 2 / (128 * (a**4).sum(1))  # noqa: E731
    close(found.above, [[large(a).mean() for a in row] for row in acts], 1e-5)
    close(found.participation, [[energy(a).mean() for a in row] for row in acts], 1e-5)
    close(found.firing, torch.stack([large(torch.cat(pair)).mean(0) for pair in zip(*acts)]), 1e-5)
    assert (found.nonzero == 1).all()  # smooth neurons


def test_relu_of_an_untrained_model_and_of_pictures() -> None:
    lm = lm_of("opt")
    found = sparsity.measure(lm, ROWS)
    assert found.nonzero.dims == ("example", "layer")
    assert ((found.nonzero > 0.3) & (found.nonzero < 0.7)).all()
    seen = sparsity.measure(wrap(tiny.model("vit")), tiny.inputs("vit"))
    assert seen.sizes["layer"] == 3
    assert "example_text" not in seen.coords


def test_refusals() -> None:
    for threshold in (-0.1, 1.0):
        with pytest.raises(InputError, match="a share of the largest"):
            sparsity.measure(lm_of("llama"), ROWS, threshold=threshold)
    with pytest.raises(SiteError, match="mixture of experts"):
        sparsity.measure(lm_of("mixtral"), ROWS)
