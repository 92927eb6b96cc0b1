"""A frozen norm is exact at its input, linear, and the same for every class of norm; what is no
norm is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from stratoscope.errors import FamilyError
from stratoscope.maths.norm import freeze

DIM = 24
NORMS: dict[str, Any] = {
    "llama": lambda: LlamaRMSNorm(DIM, eps=1e-5),
    "gemma": lambda: Gemma2RMSNorm(DIM, eps=1e-6),
    "torch rms": lambda: nn.RMSNorm(DIM),
    "layer norm": lambda: nn.LayerNorm(DIM),
    "layer norm without bias": lambda: nn.LayerNorm(DIM, bias=False),
    "layer norm without weights": lambda: nn.LayerNorm(DIM, elementwise_affine=False),
    "olmo": lambda: OlmoLayerNorm(DIM),
    "cohere": lambda: CohereLayerNorm(hidden_size=DIM),
    "large epsilon": lambda: LlamaRMSNorm(DIM, eps=0.5),
}
CENTRED = ("layer norm", "layer norm without bias", "layer norm without weights", "olmo", "cohere")


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    norm = NORMS[name]()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm


def draw(*shape: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed)) + 0.7


@torch.no_grad()
@pytest.mark.parametrize("name", NORMS)
def test_exact_at_its_input_and_linear(name: str) -> None:
    norm, x, other = made(name), draw(2, 3), draw(2, 3, seed=2)
    frozen = freeze(norm, x)
    assert frozen.centred == (name in CENTRED)
    assert torch.allclose(frozen.linear(x) + frozen.bias, norm(x), atol=1e-4, rtol=1e-4)
    parts = frozen.linear(x - other) + frozen.linear(0.25 * other) + frozen.linear(0.75 * other)
    assert torch.allclose(parts + frozen.bias, norm(x), atol=1e-4, rtol=1e-4)
    assert torch.allclose(frozen.linear(-2 * other), -2 * frozen.linear(other), atol=1e-4)
    # frozen at x, not there
    assert not torch.allclose(frozen.linear(other) + frozen.bias, norm(other), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "layer norm"])
def test_the_scale_is_one_over_the_root_mean_square(name: str) -> None:
    x = draw(5)
    moved = x - x.mean(dim=-1, keepdim=True) if name in CENTRED else x
    expected = (moved.pow(2).mean(dim=-1) + 1e-5).rsqrt()
    frozen = freeze(made(name), x)
    assert torch.allclose(frozen.scale, expected, rtol=1e-4)
    assert torch.allclose(frozen.weight, made(name).weight, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dim", [2, 3, 7, 25])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm, Gemma2RMSNorm])
def test_the_weight_is_the_module_s_own_in_even_and_odd_widths(
    kind: type[nn.Module], dim: int
) -> None:
    """A probe of +1 and -1 has mean zero in even widths only."""
    norm = kind(dim)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(dim, generator=torch.Generator().manual_seed(dim)))
    frozen = freeze(norm, torch.randn(4, dim, generator=torch.Generator().manual_seed(0)))
    expected = norm.weight + 1 if kind is Gemma2RMSNorm else norm.weight
    assert torch.allclose(frozen.weight, expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(
        frozen.bias,
        getattr(norm, "bias", None) if kind is nn.LayerNorm else torch.zeros(dim),
        atol=1e-6,
    )


@torch.no_grad()
def test_no_norm_is_the_identity() -> None:
    x = draw(2)
    frozen = freeze(None, x)
    assert torch.equal(frozen.linear(x) + frozen.bias, x)


@torch.no_grad()
def test_half_precision_is_frozen_in_full() -> None:
    norm, x = made("llama").bfloat16(), draw(4).bfloat16()
    before = norm.weight.clone()
    frozen = freeze(norm, x)
    assert frozen.scale.dtype == torch.float32
    assert torch.allclose(
        frozen.linear(x.float()) + frozen.bias, norm(x).float(), rtol=2e-2, atol=2e-2
    )
    assert torch.equal(norm.weight, before)
    assert norm.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize(
    "module",
    [
        nn.Softmax(dim=-1),
        nn.Tanh(),
        nn.Sequential(nn.LayerNorm(DIM), nn.GELU()),
        nn.Linear(DIM, DIM),
    ],
)
def test_what_is_no_norm_is_refused(module: nn.Module) -> None:
    with pytest.raises(FamilyError, match="neither an RMSNorm nor a LayerNorm"):
        freeze(module, draw(3))
