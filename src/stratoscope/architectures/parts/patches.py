"""Pictures cut into patches that do not overlap: nothing is mixed before the first layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Patches(nn.Module):
    """Patches that do not overlap, projected; (example, channel, row, column) to (example,
    position, dim)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(
        self, x: Float[Tensor, "example channel row column"]
    ) -> Float[Tensor, "example position dim"]:
        return self.projection(x).flatten(2).transpose(1, 2)


class Placed(Patches):
    """The first stage's patches, which are told where they lie."""

    def __init__(self, channels: int, dim: int, patch: int, positions: int) -> None:
        super().__init__(channels, dim, patch)
        self.place = nn.Parameter(torch.zeros(positions, dim))

    def forward(
        self, x: Float[Tensor, "example channel row column"]
    ) -> Float[Tensor, "example position dim"]:
        return super().forward(x) + self.place
