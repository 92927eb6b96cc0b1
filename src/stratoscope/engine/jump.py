"""A jump that learns where to jump: JumpReLU with a gradient for its threshold.

    z = pre * H(pre - threshold)        fires = H(pre - threshold)        H the step at 0

Both are flat in the threshold wherever they have a derivative, so that a sample's gradient is 0,
while that of the mean over samples is not. Rajamanoharan et al. ("Jumping ahead", 2024) estimate
the latter with a kernel K, here a rectangle of width 1 about 0, and a bandwidth e:

    dz/dthreshold     = -(threshold / e) K((pre - threshold) / e)
    dfires/dthreshold = -(1 / e) K((pre - threshold) / e)

Of `pre`, z has its own gradient and fires has none.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def jump(
    pre: Float[Tensor, "row feature"], threshold: Float[Tensor, " feature"], bandwidth: float
) -> tuple[Float[Tensor, "row feature"], Float[Tensor, "row feature"]]:
    """What passes, and 1 where it does; with the gradients above."""
    return _Jump.apply(pre, threshold, bandwidth)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        fires = (pre > threshold).to(pre.dtype)
        return pre * fires, fires

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_z, of_fires = gradients
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        moved = (near * (threshold * of_z + of_fires)).sum(dim=0)
        return of_z * (pre > threshold), -moved / ctx.bandwidth, None
