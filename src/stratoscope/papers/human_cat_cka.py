"""Purrturbed but Stable: Human-Cat Invariant Representations Across CNNs, ViTs and Self-Supervised
ViTs.

Shah and Tripathi, 2025. arXiv:2511.02404.
Claim: frozen vision models represent what a human and what a cat would see alike; the most aligned
    of them, DINO, the most so in early layers.
Methods: embeddings.similarity
Protocol: the encoders of the abstract, frozen: CNNs, supervised ViTs, windowed transformers and
    DINO ViT-B/16; pictures through a human and a cat's optics; encoders ranked by CKA and RSA
    over layers, with each one untrained beside it.

A cat's pupil is an upright slit: what is out of focus is blurred along the slit, up and down, and
hardly to the sides. Here a picture as it is stands for the human view, and one blurred upwards and
downwards for the cat's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stratoscope.claims import Measured, claim
from stratoscope.embeddings import similarity
from stratoscope.lab import data, net, small_nets

# pictures; a map of features is averaged to so many cells in each direction
PICTURES, CELLS = 300, 8
UPRIGHT, SIDEWAYS = 1.5, 0.3  # standard deviation of the blur, in pixels
TRAIN, STEPS, LAYERS = 10_000, 300, 6  # of the small ViT
KINDS = ("linear", "rbf", "rsa")


@claim(
    says="CKA is 1 for rotated and scaled copies, and 0 for unrelated representations",
    where="known of CKA; the paper relies on it (section not checked)",
    tier="identity",
    subject="random samples",
    expect="copy > 0.999999 and abs(unrelated) < 0.05 and biased > 0.5",
    null={
        "unrelated": "other random samples",
        "biased": "the same with the estimate that is not debiased",
    },
)
def the_scale_has_its_ends(seed: int) -> Measured:
    """Linear CKA of 60 samples of 200 features with a turned copy; with noise, the mean of ten."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(60, 200))
    k, turn = similarity.linear(x), np.linalg.qr(generator.normal(size=(200, 200)))[0]
    noise = [similarity.linear(generator.normal(size=(60, 200))) for _ in range(10)]
    plain = (k * noise[0]).sum() / np.sqrt((k * k).sum() * (noise[0] * noise[0]).sum())
    return Measured(
        values={"copy": similarity.cka(k, similarity.linear(-2 * x @ turn))},
        null={"unrelated": np.mean([similarity.cka(k, other) for other in noise]), "biased": plain},
        n=60,
    )


@claim(
    says="The two views are aligned most in early layers",
    where="abstract, of DINO ViT-B/16 alone; its supervised ViTs are quoted at blocks 8 and 14",
    read="abstract",
    tier="small",
    subject="resnet56-cifar10",
    kind="real",
    n="300 pictures",
    expect="early > late + 0.05 and early_rsa > late_rsa + 0.05 and early > 0.5 and "
    "shuffled < 0.05",
    direction="early > late and early_rsa > late_rsa",
    we_add="by more than in the same network untrained: else the architecture alone "
    "gives the order",
    we_expect="early - late > untrained_early - untrained_late + 0.05",
    null={
        "shuffled": "the cat's pictures shuffled: what 95 % of twenty orders stay below",
        "untrained_early": "the same network before training, first third of its layers",
        "untrained_late": "the same network before training, last third",
    },
    thresholds="0.05 and 0.5: the ledger's",
)
def early_layers_of_a_cnn_align(seed: int) -> Measured:
    """Gaussian CKA and RSA of both views after the stem and every third block: the mean of the
    first and of the last third. The untrained network is of the same shape, and its norms have seen
    these pictures. An earlier form of this statement had shuffled pairs as its only null, which
    oppose `early > 0.5` and not the order of layers, and it held. On seed 0 the order is there
    (0.98, 0.63) and in the untrained network too (0.87, 0.47): depth makes it, not what was
    learned."""
    return _depth(_cnn(seed), _cnn(seed, trained=False))


@claim(
    says="The two views are aligned most in early layers",
    where="abstract, of DINO ViT-B/16 alone; its supervised ViTs are quoted at blocks 8 and 14",
    read="abstract",
    tier="small",
    subject="a ViT of six layers, trained on Fashion-MNIST",
    kind="miniature",
    n="300 pictures",
    expect="early > late + 0.05 and early_rsa > late_rsa + 0.05 and early > 0.5 and "
    "shuffled < 0.05",
    direction="early > late and early_rsa > late_rsa",
    we_add="by more than in the same network untrained: else the architecture alone "
    "gives the order",
    we_expect="early - late > untrained_early - untrained_late + 0.05",
    null={
        "shuffled": "the cat's pictures shuffled: what 95 % of twenty orders stay below",
        "untrained_early": "the same network before training, first third of its layers",
        "untrained_late": "the same network before training, last third",
    },
    thresholds="0.05 and 0.5: the ledger's",
)
def early_layers_of_a_vit_align(seed: int) -> Measured:
    """The same for the tokens of a small vision transformer, from the patch embedding to the last
    layer. It hardly feels the blur: on seed 0 no CKA is below 0.97 and no RSA below 0.95 in any
    layer, so that little is left to be ordered."""
    return _depth(_vit(seed), _vit(seed, trained=False))


@claim(
    says="Representational similarity is there in every layer, and collapses when the "
    "pairing of the views is shuffled",
    where="the ledger; in the paper not checked",
    read="abstract",
    tier="small",
    side=True,
    subject="resnet56-cifar10",
    kind="real",
    n="300 pictures",
    expect="lowest > 0.3 and shuffled_rsa < 0.05",
    direction="lowest > 4 * shuffled_rsa",
    null={
        "shuffled_rsa": "the cat's pictures shuffled: what 95 % of twenty orders stay below, in "
        "the layer where that is most"
    },
    thresholds="0.3, 0.05 and 4: the ledger's",
)
def a_cnn_needs_the_pairing(seed: int) -> Measured:
    """RSA, its mean over layers and its lowest. That it collapses is true of any shuffled pairs;
    what is open is whether it was there before in every layer. For some hours of its first day this
    asked for 0.1 instead of 0.05, by mistake; the bound that was written first is back."""
    return _pairing(_cnn(seed))


@claim(
    says="Representational similarity is there in every layer, and collapses when the "
    "pairing of the views is shuffled",
    where="the ledger; in the paper not checked",
    read="abstract",
    tier="small",
    side=True,
    subject="a ViT of six layers, trained on Fashion-MNIST",
    kind="miniature",
    n="300 pictures",
    expect="lowest > 0.3 and shuffled_rsa < 0.05",
    direction="lowest > 4 * shuffled_rsa",
    null={
        "shuffled_rsa": "the cat's pictures shuffled: what 95 % of twenty orders stay below, in "
        "the layer where that is most"
    },
    thresholds="0.3, 0.05 and 4: the ledger's",
)
def a_vit_needs_the_pairing(seed: int) -> Measured:
    """The same for the small vision transformer. Its RSA of 0.977 on seed 0 says first of all that
    it hardly feels the blur."""
    return _pairing(_vit(seed))


def _depth(found: dict[str, np.ndarray], untrained: dict[str, np.ndarray]) -> Measured:
    third = max(len(found["rbf"]) // 3, 1)
    early, late = ({kind: part(found[kind], third) for kind in KINDS} for part in (_first, _last))
    return Measured(
        values={
            "early": early["rbf"],
            "late": late["rbf"],
            "early_linear": early["linear"],
            "late_linear": late["linear"],
            "early_rsa": early["rsa"],
            "late_rsa": late["rsa"],
            "peak": int(found["rbf"].argmax()),
        },
        null={
            "shuffled": found["null_high_rbf"].max(),
            "untrained_early": _first(untrained["rbf"], third),
            "untrained_late": _last(untrained["rbf"], third),
        },
        n=PICTURES,
        interval={
            "early": (_first(found["low_rbf"], third), _first(found["high_rbf"], third)),
            "late": (_last(found["low_rbf"], third), _last(found["high_rbf"], third)),
        },
        figure=_lines(found),
        note="The intervals are the means of the layers' own, over random halves of the pictures.",
    )


def _pairing(found: dict[str, np.ndarray]) -> Measured:
    return Measured(
        values={"rsa": found["rsa"].mean(), "lowest": found["rsa"].min()},
        null={"shuffled_rsa": found["null_high_rsa"].max()},
        n=PICTURES,
        figure=_lines(found),
    )


def _lines(found: dict[str, np.ndarray]) -> xr.DataArray:
    names = {
        "linear": "linear CKA",
        "rbf": "Gaussian CKA",
        "rsa": "RSA",
        "null_rsa": "RSA, shuffled",
    }
    return xr.DataArray(
        [found[name] for name in names],
        {"measure": list(names.values())},
        ["measure", "layer"],
        name="similarity",
    )


def _first(x: np.ndarray, count: int) -> float:
    return float(x[:count].mean())


def _last(x: np.ndarray, count: int) -> float:
    return float(x[-count:].mean())


def _slit(x: Tensor) -> Tensor:
    """Pictures (example, channel, row, column) as through an upright slit."""
    at = torch.arange(-4, 5).float()
    upright, sideways = (torch.exp(-((at / s) ** 2) / 2) for s in (UPRIGHT, SIDEWAYS))
    kernel = torch.outer(upright / upright.sum(), sideways / sideways.sum())
    channels = x.shape[1]
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    return nn.functional.conv2d(padded, kernel.expand(channels, 1, 9, 9), groups=channels)


@cache
@torch.no_grad()
def _cnn(seed: int, *, trained: bool = True) -> dict[str, np.ndarray]:
    """`similarity.compare` at the stem and after every third block of ResNet-56: by name,
    (layer)."""
    model: Any = net("resnet56-cifar10")
    preprocess, test = model.preprocess, data("cifar10").test
    if not trained:
        model = small_nets.fresh(type(model), seed)
    drawn = np.random.default_rng(seed).permutation(len(test.y))[:PICTURES]
    seen: list[Tensor] = []
    blocks = [block for stage in model.stages for block in list(stage)[2::3]]
    hooks = [
        part.register_forward_hook(
            lambda _, __, out: seen.append(nn.functional.adaptive_avg_pool2d(out, CELLS).flatten(1))
        )
        for part in (model.norm, *blocks)
    ]
    views = []
    try:
        x = preprocess(test.x[drawn])
        if not trained:
            _settle(model, x)
        for view in (x, _slit(x)):
            parts = []
            for some in view.split(50):
                seen.clear()
                model(some)
                parts.append(list(seen))
            views.append([torch.cat(layer).numpy() for layer in zip(*parts)])
    finally:
        for hook in hooks:
            hook.remove()
    return _compared(*views, seed)


@cache
def _vit(seed: int, *, trained: bool = True) -> dict[str, np.ndarray]:
    """The same at the patch embedding and after each layer of a small ViT."""
    pictures = data("fashion-mnist")
    model = small_nets.fresh(lambda: small_nets.vit(layers=LAYERS), seed)
    if trained:
        model = small_nets.train(
            model, *small_nets.ready(pictures.train, TRAIN, seed), seed=seed, steps=STEPS
        )
    x, _ = small_nets.ready(pictures.test, PICTURES, seed)
    with torch.no_grad():
        views = [model(view, output_hidden_states=True).hidden_states for view in (x, _slit(x))]
    return _compared(*([layer.flatten(1).numpy() for layer in view] for view in views), seed)


def _settle(model: nn.Module, x: Tensor) -> None:
    """Give the batch norms of a fresh network the means and deviations of these pictures."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the running statistics become the plain mean over batches
    model.train()(x)
    model.eval()


def _compared(one: list[np.ndarray], two: list[np.ndarray], seed: int) -> dict[str, np.ndarray]:
    rows = [similarity.compare(a, b, draws=10, seed=seed) for a, b in zip(one, two)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
