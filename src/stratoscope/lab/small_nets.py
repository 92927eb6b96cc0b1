"""Classifiers of small grey pictures that train in seconds on one core: an MLP, a CNN, and a ReLU
vision transformer; and the two halves of a convolutional autoencoder.

    net = train(mlp, *ready(mnist.train), seed=0)
    accuracy(net, *ready(mnist.test))
    train(lambda: nn.Sequential(encoder(), decoder(64)), x, x, seed=0, loss=nn.functional.mse_loss)

Nothing is cached: the same seed, sizes and number of threads give the same weights again. The
transformer is an ordinary Hugging Face ViT, so that every method works on it: `wrap(net)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.engine.train import Recipe
from stratoscope.engine.train import train as learn
from stratoscope.lab.datasets._data import Pictures


def ready(pictures: Pictures, count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels (example, channel=1, row, column) with mean 0 and deviation 1, and classes: all, or
    `count` drawn ones."""
    chosen = np.arange(len(pictures.y))
    if count is not None:
        chosen = np.random.default_rng(seed).permutation(len(chosen))[:count]
    x = torch.as_tensor(pictures.x[chosen]).float()[:, None]
    return (x - x.mean()) / x.std(), torch.as_tensor(pictures.y[chosen]).long()


def mlp(hidden: int = 128, layers: int = 2, pixels: int = 784, classes: int = 10) -> nn.Sequential:
    """Flatten, then `layers` times (linear, ReLU), then a linear read-out: `net[:-1]` is the
    encoder."""
    widths = [pixels, *[hidden] * layers]
    inner = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(hidden, classes))


def cnn(channels: int = 24, classes: int = 10) -> nn.Sequential:
    """Three strided convolutions with ReLU, the mean over the picture, a linear read-out."""
    sizes = [1, channels, 2 * channels, 2 * channels]
    inner = [
        p for a, b in pairwise(sizes) for p in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())
    ]
    return nn.Sequential(
        *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes)
    )


def vit(
    layers: int = 3,
    dim: int = 48,
    neurons: int = 192,
    size: int = 28,
    patch: int = 7,
    classes: int = 10,
) -> Any:
    """A Hugging Face ViTForImageClassification of one channel, with ReLU neurons."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": neurons,
        "num_attention_heads": 4,
    }
    picture = {"image_size": size, "patch_size": patch, "num_channels": 1, "num_labels": classes}
    return ViTForImageClassification(ViTConfig(**sizes, **picture, hidden_act="relu"))


def encoder(channels: Sequence[int] = (16, 32, 32, 16)) -> nn.Sequential:
    """Pictures of 28 x 28 to vectors of 4 times the last of the `channels`: four strided
    convolutions, each with batch norm and a leaky ReLU."""
    inner = [
        part
        for a, b in pairwise([1, *channels])
        for part in (
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            nn.BatchNorm2d(b),
            nn.LeakyReLU(),
        )
    ]
    return nn.Sequential(*inner, nn.Flatten())


def decoder(width: int, channels: Sequence[int] = (16, 32, 32, 16)) -> nn.Sequential:
    """Vectors of any width to pictures of 28 x 28: a layer norm and a linear layer, then `encoder`
    the other way round, by transposed convolutions."""
    back = [*reversed(channels), channels[0]]
    # 2, 4, 7, 14 and 28 pixels: an odd side needs no row more
    inner = [
        part
        for a, b, more in zip(back, back[1:], (1, 0, 1, 1))
        for part in (
            nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=more),
            nn.BatchNorm2d(b),
            nn.LeakyReLU(),
        )
    ]
    first = (nn.LayerNorm(width), nn.Linear(width, 4 * back[0]), nn.GELU())
    return nn.Sequential(
        *first, nn.Unflatten(1, (back[0], 2, 2)), *inner, nn.Conv2d(back[-1], 1, 3, padding=1)
    )


def fresh(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """An untrained net whose weights depend on the seed alone; torch's own random state is left as
    it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


@torch.no_grad()
def settle(net: nn.Module, x: Float[Tensor, "example channel row column"]) -> None:
    """Give the batch norms of an untrained net the means and deviations of these pictures, so that
    it can be compared with a trained one; in place, in evaluation mode afterwards."""
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [part.momentum for part in norms]
    for part in norms:
        part.momentum = None  # the running statistics become the plain mean over batches
    net.train()(x)
    net.eval()
    for part, momentum in zip(norms, momenta):
        part.momentum = momentum


def train(
    net: nn.Module | Callable[[], nn.Module],
    x: Float[Tensor, "example channel row column"],
    y: Int[Tensor, " example"] | Float[Tensor, "example channel row column"],
    *,
    seed: int,
    steps: int = 600,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 0.01,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Any:
    """Minimise the cross-entropy, or another `loss` of (what the net says, y), with AdamW under a
    cosine schedule; a builder is first built with the seed.

    Gives the net in evaluation mode. Classes may be anything, right or wrong: random labels are
    given as they are. An autoencoder takes its pictures as y.
    """
    net = net if isinstance(net, nn.Module) else fresh(net, seed)
    batches = _batches(len(y), batch, seed)

    def of_step(net: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = next(batches)
        return loss(logits(net, x[rows]), y[rows])

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([group | {"weight_decay": decay} for group in groups])

    recipe = Recipe(
        net,
        of_step,
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        betas=(0.9, 0.999),
        optimiser=adamw,
        schedule=lambda step: _one_cycle(rate, step, steps),
    )
    learn(recipe, None, seed=seed)
    return net.eval()


def _batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of one batch after the other; a shuffle's rest is the beginning of the next
    batch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        yield order[:size]
        order = order[size:]


def _one_cycle(rate: float, step: int, steps: int) -> float:
    """The learning rate of torch's OneCycleLR: a cosine up for a tenth of the steps, then one down
    to nearly nothing (Smith and Topin 2017, arXiv:1708.07120)."""
    low, top = rate / 25, 0.1 * steps - 1
    start, end, along = (
        (low, rate, step / top)
        if step <= top
        else (rate, low / 1e4, (step - top) / (steps - 1 - top))
    )
    return end + (start - end) / 2.0 * (math.cos(math.pi * along) + 1)


def logits(
    net: nn.Module, x: Float[Tensor, "example channel row column"]
) -> Float[Tensor, "example ..."]:
    """What the net says (classes, or pictures), be it a plain net or a Hugging Face one."""
    output = net(x)
    return getattr(output, "logits", output)


@torch.no_grad()
def probabilities(
    net: nn.Module, x: Float[Tensor, "example channel row column"]
) -> Float[Tensor, "example class"]:
    """Softmax of the logits, in parts that fit."""
    return torch.cat([logits(net, part).softmax(dim=-1) for part in x.split(512)])


def accuracy(
    net: nn.Module, x: Float[Tensor, "example channel row column"], y: Int[Tensor, " example"]
) -> float:
    """Share of pictures whose class is the most probable one."""
    return (probabilities(net, x).argmax(dim=-1) == y).float().mean().item()
