"""A norm frozen at one input: the linear map that it is once its scale is held fixed.

RMSNorm and LayerNorm are  y = weight * (x - mean) * scale + bias  with scale = 1 / rms(x - mean).
With the scale of the real input held fixed, the norm is linear, so that the parts of x contribute
to y exactly additively.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.errors import FamilyError, InputError


@dataclass(frozen=True)
class FrozenNorm:
    """weight, bias: (dim,). scale: (...), one for each input. centred: whether the mean is taken
    away (LayerNorm)."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    def linear(self, part: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """What a part of the input contributes to the output, without the bias. `scale` broadcasts
        against (...)."""
        if self.centred:
            part = part - part.mean(dim=-1, keepdim=True)
        return part * self.weight * self.scale[..., None]


def freeze(module: nn.Module | None, x: Float[Tensor, "... dim"]) -> FrozenNorm:
    """Freeze a norm at x, in fp32, whatever the module's class: weight and bias are read off by
    probing it.

    None is the identity (a model without final norm). Raises InputError for what is not a number,
    and FamilyError when the module is neither an RMSNorm nor a LayerNorm, which shows as an output
    that the frozen form does not reproduce.
    """
    dim, x = x.shape[-1], x.float()
    if module is None:
        return FrozenNorm(
            x.new_ones(dim), x.new_zeros(dim), x.new_ones(x.shape[:-1]), centred=False
        )
    # a small module; probing it in half precision would drown in rounding, and a call would run the
    # hooks copied with it
    norm = deepcopy(module).float().forward
    bias = norm(x.new_zeros(dim))
    # An input of +-1 has mean zero and rms one; made large, epsilon vanishes, and both kinds give
    # weight * sign + bias.
    sign = x.new_ones(dim)
    sign[::2] = -1
    sign = sign - sign.mean()
    rms = sign.pow(2).mean().sqrt()
    weight = (norm(1e4 * sign) - bias) * rms / sign
    out = norm(x)
    if not bool((weight.isfinite() & bias.isfinite()).all() & out.isfinite().all()):
        raise InputError(
            f"the weight of {type(norm).__name__}, or what it reads, is not a number (nan) "
            "somewhere."
        )
    centred = bool(torch.allclose(norm(x.new_full((dim,), 1e4)), bias, atol=1e-3, rtol=1e-3))
    moved = x - x.mean(dim=-1, keepdim=True) if centred else x
    shaped = moved * weight
    scale = ((out - bias) * shaped).sum(dim=-1) / shaped.pow(2).sum(dim=-1).clamp_min(1e-30)
    frozen = FrozenNorm(weight, bias, scale, centred)
    rebuilt = frozen.linear(x) + bias
    if not torch.allclose(
        rebuilt, out, atol=1e-3 * float(out.abs().max().clamp_min(1e-6)), rtol=1e-3
    ):
        raise FamilyError(
            f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm: it cannot be made "
            "linear."
        )
    return frozen
