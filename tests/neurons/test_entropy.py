"""Entropy neurons: a null space by hand, entropies by plain Hugging Face with a plain hook, and a
neuron that was made to write where the unembedding does not look."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.models import LM, wrap
from stratoscope.neurons import entropy
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, parts, untouched

EXAMPLE = {
    "measure": lambda case: {"reference": case.references, "units": [3, 5], "draws": 2},
}


def test_by_hand() -> None:
    read = torch.tensor([[3.0, 0, 0], [-3, 1, 0], [0, -1, 0]]) + torch.tensor([0, 0, 7.0])
    basis, sizes = entropy.null_space(read, 1)  # dim 2 moves all logits alike
    close(basis.abs(), [[0.0], [0], [1]], 1e-4)
    close(sizes, torch.linalg.svdvals(read - read.mean(0)).flip(0), 1e-3)
    assert entropy.null_space(read, 2)[0].shape == (3, 2)
    assert entropy.null_space(torch.eye(3)[:1].repeat(2, 1), 1)[0].shape[1] == 3  # all alike
    assert float(entropy.entropy(torch.zeros(4))) == pytest.approx(math.log(4))
    assert float(entropy.entropy(torch.tensor([99.0, 0, 0]))) == pytest.approx(0)


@torch.no_grad()
def plain_entropy(lm: LM, row: list[int], change: tuple[int, float] | None = None) -> Tensor:
    """Of every position, with one neuron of the last layer held by a plain hook."""
    module = parts(lm, lm.dims.layers - 1)[1]

    def hook(_, args):
        x = args[0].clone()
        x[..., change[0]] = change[1]
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook) if change else None
    logits = lm.model(torch.tensor([row])).logits[0].double()
    if handle:
        handle.remove()
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


@torch.no_grad()
def means(lm: LM, rows: list[list[int]]) -> Tensor:
    module, seen = parts(lm, lm.dims.layers - 1)[1], []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    for row in rows:
        lm.model(torch.tensor([row]))
    handle.remove()
    return torch.cat(seen).mean(dim=0)


def loud(name: str) -> LM:
    """A tiny model whose last MLP writes so much that a neuron's effect is far above rounding."""
    lm = lm_of(name)
    with torch.no_grad():
        if name == "gemma2":  # a norm stands behind it
            lm.model.model.layers[-1].post_feedforward_layernorm.weight += 20
        else:
            parts(lm, lm.dims.layers - 1)[1].weight *= 20
    return wrap(lm.model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_entropies_are_those_of_a_plain_hook(name: str) -> None:
    lm, units = loud(name), [3, 17, 40]
    with untouched(lm):
        found = entropy.measure(lm, ROWS, units=units, draws=3)
    left = entropy.measure(lm, padded(ROWS, "left"), units=units, draws=3)
    value = means(lm, ROWS)
    for n, row in enumerate(ROWS):
        before = plain_entropy(lm, row)
        for u, unit in enumerate(units):
            moved = plain_entropy(lm, row, (unit, float(value[unit]))) - before
            expected = [float(moved.abs().mean()), float(moved.mean())]
            close([found.effect[n, u], found.change[n, u]], expected, 5e-4)
            close([left.effect[n, u], left.change[n, u]], expected, 5e-4)
            assert expected[0] > 1e-4
    other = entropy.measure(lm, ROWS, units=units, draws=3, reference=ROWS[:1])
    moved = plain_entropy(lm, ROWS[1], (3, float(means(lm, ROWS[:1])[3])))
    gap = (moved - plain_entropy(lm, ROWS[1])).abs().mean()
    close(other.effect[1, 0], gap, 5e-4)


def planted(name: str, unit: int = 11) -> LM:
    """A tiny model whose unembedding does not look at four dimensions; one neuron of the last layer
    writes there alone, loudly."""
    model = tiny.model(name)
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
        model.lm_head.weight[:, 28:] = 0
        lm = wrap(model)
        module = parts(lm, lm.dims.layers - 1)[1]
        write = torch.zeros(32)
        write[28], write[29] = 6.0, -6.0
        if name == "gpt2":
            module.weight[unit] = write
        else:
            module.weight[:, unit] = write
    return wrap(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_planted_neuron_is_found_and_acts_through_the_norm_alone(name: str) -> None:
    lm = planted(name)
    found = entropy.measure(lm, ROWS, top=2, dims=4, draws=20)
    assert int(found.unit_neuron[0]) == 11
    assert float(found.share[11]) == pytest.approx(1, abs=1e-4)
    assert float(found.share.sortby(found.share)[-2]) < 0.5
    assert float(found.expected) == pytest.approx(4 / 32 if name == "llama" else 4 / 31)
    assert float(found.effect[:, 0].mean()) > float(found["null"].mean())
    assert float(found.held[:, 0].max()) < 1e-5 < 1e-3 < float(found.effect[:, 0].min())
    assert float(found.through_norm[0]) > 0.99
    ratio = 1 - float(found.null_held.sum() / found["null"].sum())
    assert ratio < 0.5  # random neurons act on the logits themselves


def test_a_random_direction_has_the_expected_share() -> None:
    lm = lm_of("llama")
    found = entropy.measure(lm, ROWS, draws=1)
    assert float(found.share.mean()) == pytest.approx(float(found.expected), rel=0.4)
    assert found.settings.count('"dims": 2') == 1  # a twentieth of 32


def test_refusals() -> None:
    lm = lm_of("llama")
    for more, said in (
        ({"dims": 32}, "dims=32"),
        ({"draws": 0}, "draws=0"),
        ({"top": 0}, "top=0"),
        ({"units": [48]}, "0 to 47"),
        ({"units": []}, "at least one"),
        ({"units": list(range(48))}, "none is random"),
    ):
        with pytest.raises(InputError, match=said):
            entropy.measure(lm, ROWS, **more)
    with pytest.raises(SiteError, match="no linear way"):
        entropy.measure(lm_of("bert"), ROWS)
