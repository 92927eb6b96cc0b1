"""Autoencoders and untrained nets of the small nets: shapes, learning, and norms that fit."""

from __future__ import annotations

import torch
from torch import nn

from stratoscope.lab import small_nets


def pictures(count: int) -> torch.Tensor:
    """Bars, upright or level, somewhere: what a code of 64 numbers can hold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(count, 1, 28, 28)
    for one, at in zip(x, torch.randint(2, 24, (count,), generator=generator).tolist()):
        one[0, :, at : at + 3] = 1
    turned = torch.rand(count, generator=generator) < 0.5
    x[turned] = x[turned].transpose(2, 3)
    return (x - x.mean()) / x.std()


def test_an_autoencoder_learns_and_its_halves_fit() -> None:
    x = pictures(256)
    made = small_nets.encoder()(x[:3])
    assert made.shape == (3, 64)
    assert small_nets.decoder(300)(torch.randn(3, 300)).shape == (3, 1, 28, 28)
    net = small_nets.train(
        lambda: nn.Sequential(small_nets.encoder(), small_nets.decoder(64)),
        x,
        x,
        seed=0,
        steps=60,
        batch=64,
        rate=3e-3,
        loss=nn.functional.mse_loss,
    )
    assert not net.training
    with torch.no_grad():
        error = nn.functional.mse_loss(net(x), x)
    assert error < 0.6  # 1 is the mean over all pixels, cross-entropy would not run


def test_settled_norms_pass_these_pictures_with_mean_0_and_deviation_1() -> None:
    net = small_nets.fresh(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 0
    )
    x = 5 + 3 * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    small_nets.settle(net, x)
    out = net[:2](x)
    assert not net.training
    assert out.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (out.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2
    assert net[1].momentum == 0.1
