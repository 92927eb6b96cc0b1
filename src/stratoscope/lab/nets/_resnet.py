"""The residual network of He et al. (2016) for pictures of 32 x 32 pixels, section 4.2, 56 layers
deep."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a skip connection."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        project = (nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Sequential(*(project if width_in != width else ()))

    def forward(self, x: Tensor) -> Tensor:
        """x (example, width_in, row, column) to (example, width, row / stride, column / stride)."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.skip(x))


class ResNet56(nn.Module):
    """Three stages of nine blocks, 16, 32 and 64 channels wide, then the mean over the picture and
    a linear read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = ((16, 16), (16, 32), (32, 64))
        stages = (
            [Block(a, b, 1 + (a != b)), *(Block(b, b, 1) for _ in range(8))] for a, b in widths
        )
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (example, 3, 32, 32), from 0 to 1, to logits (example, 10)."""
        x = F.relu(self.norm(self.conv(x)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))
