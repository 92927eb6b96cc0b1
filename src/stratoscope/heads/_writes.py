"""What the heads of a layer write into the residual stream, one by one."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.maths.norm import freeze
from stratoscope.models.lm import LM


def head_writes(lm: LM, layer: int, z: Float[Tensor, "example head head_dim"]) -> Float[Tensor, "example head dim"]:
    """Each query head's own part of attn.out, in double precision: the projection's bias belongs to none of them.

    A post-norm (Gemma 2) is held at the scale it has on this input, so that the parts add up.
    """
    [site] = lm.layout.resolve(f"layers.{layer}.attn.out")
    projection, *post = lm.layout.writers(site)
    by_head = lm.weight(site).double().unflatten(1, z.shape[1:])
    writes = torch.einsum("ehk,dhk->ehd", z.double(), by_head)
    for module in post:
        norm = freeze(module, projection(z.flatten(1)))
        writes = replace(norm, scale=norm.scale[:, None]).linear(writes)
    return writes
