"""Pooling, the token mixer of PoolFormer: each patch hears the mean of its neighbourhood, less
itself.

    Mix(x)[i] = mean of x[j] over the size x size patches around i that lie in the picture  -  x[i]

It has no parameter, and is linear: Mix(x) = pattern @ x, the same pattern for every picture.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Mixer(nn.Module):
    """grid: rows and columns of patches, which `position` counts row by row. size: of the
    neighbourhood, odd."""

    def __init__(self, dim: int, grid: tuple[int, int], *, size: int = 3) -> None:
        super().__init__()
        self.grid = grid
        self.pool = nn.AvgPool2d(size, stride=1, padding=size // 2, count_include_pad=False)

    def forward(
        self, x: Float[Tensor, "example position dim"]
    ) -> Float[Tensor, "example position dim"]:
        picture = x.transpose(1, 2).unflatten(2, self.grid)
        return self.pool(picture).flatten(2).transpose(1, 2) - x

    def pattern(self, x: Float[Tensor, "example position dim"]) -> Float[Tensor, "query key"]:
        """What each query takes of each key; rows sum to zero."""
        single = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[..., None]
        return self.forward(single)[..., 0].T
