"""An MLP as a sum of heads: known coefficients come back, from tensors and from a model whose MLP
was made of heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratoscope.engine.trace import capture
from stratoscope.engine.writes import head_writes
from stratoscope.errors import InputError, SiteError
from stratoscope.heads import mlp_decomposition
from stratoscope.models import LM
from support.subjects import ROWS, close, entering, lm_of, parts

EXAMPLE = {"measure": {}}

MORE = [*ROWS, [5, 6, 7, 8], [50, 60, 70], [9, 12, 44, 3, 3, 81], [77, 20]]


def test_known_coefficients_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randn(6, 4, 10, generator=generator, dtype=torch.double)
    true, shift = (
        torch.tensor([-1.0, 0.5, 0.0, 2.0]).double(),
        torch.randn(10, generator=generator).double(),
    )
    out = torch.einsum("p,epd->ed", true, pieces) + shift
    coefficient, intercept, explained = mlp_decomposition.decompose(out, pieces)
    close(coefficient, true, 1e-9)
    close(intercept, shift, 1e-9)
    assert float(explained) == pytest.approx(1)
    noise = torch.randn(6, 10, generator=generator).double()
    table = np.asarray((pieces - pieces.mean(0)).transpose(1, 2).reshape(60, 4))
    target = out + noise
    centred = np.asarray((target - target.mean(0)).flatten())
    expected, rest, *_ = np.linalg.lstsq(table, centred)
    coefficient, _, explained = mlp_decomposition.decompose(target, pieces)
    close(coefficient, expected, 1e-9)
    assert float(explained) == pytest.approx(1 - rest[0] / (centred**2).sum())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_head_writes_add_up(name: str) -> None:
    """To attn.out, but for the bias, which is what is written when all z are zero."""
    lm = lm_of(name)
    seen = capture(lm, ROWS, "layers.1.attn.z", "layers.1.attn.out", positions=-1)
    writes, rest = head_writes(lm, 1, seen["layers.1.attn.z"])
    close(writes.sum(dim=1) + rest, seen["layers.1.attn.out"], 1e-5)
    assert writes.shape == (2, 4, lm.dims.dim)
    bias = parts(lm, 1)[0].bias if name == "gpt2" else torch.zeros(lm.dims.dim)
    close(writes.sum(dim=1) + bias, seen["layers.1.attn.out"], 1e-5)
    if name == "gpt2":
        module = parts(lm, 1)[0]
        z = entering(lm, module, ROWS[0])[-1]
        close(writes[0, 2], z[16:24] @ module.weight[16:24], 1e-5)


@contextmanager
def mlp_made_of_heads(
    lm: LM, layer: int, coefficients: dict[int, float], shift: Tensor
) -> Iterator[None]:
    """The MLP of a layer writes these multiples of what the heads wrote, and `shift`."""
    projection, mlp = parts(lm, layer)[0], lm.model.model.layers[layer].mlp
    size, seen = lm.dims.head_dim, {}

    def look(_: nn.Module, args: tuple) -> None:
        seen["z"] = args[0]

    def put(x: Tensor) -> Tensor:
        made = shift.expand_as(x).clone()
        for head, factor in coefficients.items():
            here = slice(head * size, (head + 1) * size)
            made += factor * seen["z"][..., here] @ projection.weight[:, here].T
        return made

    hook, own = projection.register_forward_pre_hook(look), mlp.forward
    mlp.forward = put
    yield
    mlp.forward = own
    hook.remove()


@torch.no_grad()
def test_an_mlp_that_erases_and_amplifies() -> None:
    lm = lm_of("llama")
    shift = torch.linspace(-1, 1, lm.dims.dim)
    with mlp_made_of_heads(lm, 1, {0: 0.5, 2: -1.0}, shift):
        found = mlp_decomposition.measure(lm, MORE)
    close(found.coefficient[1], [0.5, 0, -1, 0], 1e-4)
    close(found.intercept[1], shift, 1e-4)
    assert abs(float(found.stream[1])) < 1e-4
    assert float(found.explained[1]) == pytest.approx(1, abs=1e-5)
    assert float(found.null[1]) < 0.5  # heads of another prompt explain little of it
    assert (found.explained[[0, 2]] < 0.5).all()  # the other layers' MLPs are no multiples of heads


def test_refusals() -> None:
    with pytest.raises(InputError, match="one prompt"):
        mlp_decomposition.measure(lm_of("llama"), [ROWS[0]])
    with pytest.raises(SiteError, match="parallel"):
        mlp_decomposition.measure(lm_of("gpt_neox"), ROWS)
    with pytest.raises(SiteError, match="no such parts"):
        mlp_decomposition.measure(lm_of("bert"), ROWS)
