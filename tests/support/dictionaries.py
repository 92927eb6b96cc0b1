"""Sparse dictionaries for tests: drawn at random, and made of a model's own neurons."""

from __future__ import annotations

from typing import Any

import torch

from stratoscope.engine.dictionary import Dictionary, Kind
from stratoscope.models import LM


def drawn(
    dim: int,
    site: str,
    *,
    kind: Kind = "relu",
    features: int = 24,
    out: int | None = None,
    site_out: str = "",
    seed: int = 0,
    **more: Any,
) -> Dictionary:
    """A random dictionary; a transcoder where `site_out` is given."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / 2

    own: dict[str, Any] = {
        "topk": {"k": 5},
        "jumprelu": {"threshold": draw(features).abs()},
        "batchtopk": {"threshold": torch.tensor(0.4)},
        "gated": {"b_mag": draw(features), "r_mag": draw(features)},
    }.get(kind, {})
    written = {"b_dec_out": draw(out or dim)} if site_out else {}
    made = {
        "W_enc": draw(dim, features),
        "b_enc": draw(features),
        "W_dec": draw(features, out or dim),
        "b_dec": draw(dim),
    }
    return Dictionary(kind=kind, site_in=site, site_out=site_out, **made | own | written | more)


def neurons(lm: LM, layer: int) -> Dictionary:
    """The MLP of one layer of an OPT, ReLU and all, as a transcoder of its own neurons."""
    block = lm.model.model.decoder.layers[layer]
    width = len(block.fc1.weight)
    return Dictionary(
        W_enc=torch.eye(width),
        b_enc=torch.zeros(width),
        W_dec=block.fc2.weight.detach().T.contiguous(),
        b_dec=torch.zeros(width),
        b_dec_out=block.fc2.bias.detach(),
        site_in=f"layers.{layer}.mlp.pre",
        site_out=f"layers.{layer}.mlp.out",
    )
