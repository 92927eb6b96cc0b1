"""The sets of pictures, the small networks and the scores of `human_cat_cka.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.claims import Measured
from stratoscope.embeddings import views
from stratoscope.lab import data, net, optics, small_nets
from stratoscope.maths.resample import interval

# sets of pictures, and pictures of each: six left the interval of the null too wide in a pilot
SETS, EACH = 10, 50
# deviations along the slit, in pixels of photographs (32) and of clothes (28), which are smoother:
# in pilots 3 pixels left both kinds of small network above 0.96
BLURS, SMOOTH = (0.75, 1.5, 3.0), (2.0, 4.0, 8.0)
PAIRS, TRAIN, STEPS, LAYERS = 10, 10_000, 300, 4  # of the miniatures
Scores = dict[str, np.ndarray]
# of the real networks of pictures there are: after the stem, and every third or second block
PARTS = {
    "resnet56-cifar10": ["norm", *(f"stages.{s}.{block}" for s in range(3) for block in (2, 5, 8))],
    "mobilenetv2": [
        "mobilenet_v2.conv_stem",
        *(f"mobilenet_v2.layer.{i}" for i in range(0, 16, 2)),
    ],
}


def sets(seed: int) -> list[Tensor]:
    """Test pictures of CIFAR-10, float (example, 3, 32, 32) of 0 to 255; none is in two sets."""
    test = data("cifar10").test
    drawn = np.random.default_rng(seed).permutation(len(test.y))[: SETS * EACH]
    return list(torch.as_tensor(test.x[drawn]).permute(0, 3, 1, 2).float().split(EACH))


def ready_of(model: Any) -> Callable[[Tensor], Tensor]:
    """What turns pictures of `sets` into what a real network takes."""
    return lambda x: model.preprocess(x.permute(0, 2, 3, 1))


def order_of(name: str, again: Callable[[Any, Any], nn.Module], seed: int) -> Measured:
    """again: builds the network once more from its class and itself."""
    model: Any = net(name)
    ready, every = ready_of(model), sets(seed)
    idle = small_nets.fresh(lambda: again(type(model), model), seed)
    small_nets.settle(idle, ready(every[0]))
    return order([seen(model, idle, PARTS[name], x, BLURS, ready) for x in every], BLURS, name)


def means(name: str, seed: int) -> Float[np.ndarray, " set"]:
    """Gaussian CKA of both views in a real network, the mean over its parts and the blurs."""
    model: Any = net(name)
    ready, rows = ready_of(model), []
    for x in sets(seed):
        others = [ready(optics.slit(x, blur)) for blur in BLURS]
        rows.append(views.aligned(model, PARTS[name], ready(x), others)["rbf"].mean())
    return np.array(rows)


def seen(
    trained: nn.Module,
    idle: nn.Module,
    parts: Sequence[str],
    x: Tensor,
    blurs: Sequence[float],
    ready: Callable[[Tensor], Tensor] = lambda x: x,
) -> Scores:
    """The scores of `views.aligned` for every width of the slit, (width, part); those of the
    untrained network with `untrained_` before them."""
    others = [ready(optics.slit(x, blur)) for blur in blurs]
    found = views.aligned(trained, parts, ready(x), others)
    bare = views.aligned(idle, parts, ready(x), others)
    return found | {f"untrained_{name}": row for name, row in bare.items()}


@cache
def trained(kind: str, seed: int, pair: int) -> Scores:
    """The scores of one small network, and its accuracy on other test pictures."""
    pictures = data("fashion-mnist")
    build, parts = (_vit, ["vit.embeddings", *(f"vit.layers.{i}" for i in range(LAYERS))])
    if kind == "cnn":
        build, parts = _cnn, [f"0.{at}" for at in (2, 5, 8, 11)]  # after each convolution
    own = 1000 * seed + pair
    model = small_nets.train(
        build, *small_nets.ready(pictures.train, TRAIN, seed), seed=own, steps=STEPS
    )
    x, y = small_nets.ready(pictures.test, PAIRS * EACH + 2000, seed)
    accuracy = small_nets.accuracy(model, x[PAIRS * EACH :], y[PAIRS * EACH :])
    idle = small_nets.fresh(build, 500 + own)
    mine = x[pair * EACH : (pair + 1) * EACH]
    small_nets.settle(idle, mine)
    return seen(model, idle, parts, mine, SMOOTH) | {"accuracy": np.array(accuracy)}


def _vit() -> nn.Module:
    return small_nets.vit(layers=LAYERS)


def _cnn() -> nn.Module:
    return nn.Sequential(small_nets.encoder(), nn.Linear(64, 10))


def order(scores: Sequence[Scores], blurs: Sequence[float], name: str) -> Measured:
    """The order of layers, in each set of pictures: the first third and the last, by CKA, the mean
    over widths of the slit; lowest: the layer where both views are least alike."""
    third = max(scores[0]["rbf"].shape[1] // 3, 1)

    def drop(kind: str) -> np.ndarray:
        rows = np.array([each[kind].mean(axis=0) for each in scores])
        return rows[:, :third].mean(axis=1) - rows[:, -third:].mean(axis=1)

    layers = np.array([each["rbf"] for each in scores])
    units = {
        "early": layers[..., :third].mean(axis=(1, 2)),
        "late": layers[..., -third:].mean(axis=(1, 2)),
        "lowest": layers.mean(axis=1).min(axis=1),
        "drop": drop("rbf"),
        "drop_rsa": drop("rsa"),
        "untrained_drop": drop("untrained_rbf"),
        "shuffled_drop": drop("shuffled_rbf"),
    }
    figure = xr.DataArray(
        layers.mean(axis=0),
        {"blur": [f"{blur} pixels" for blur in blurs]},
        ["blur", "layer"],
        name="Gaussian CKA",
        attrs={"title": f"how alike both views are, layer by layer, in {name}"},
    )
    return measured(units, "shuffled_drop", figure)


def measured(units: Scores, null: str, figure: xr.DataArray | None) -> Measured:
    bare = interval(units[null])
    return Measured(
        units={name: row for name, row in units.items() if name != null},
        null={null: bare.value},
        interval={null: (bare.low, bare.high)},
        n=bare.n,
        figure=figure,
    )


def by_blur(lines: list[np.ndarray], names: list[str], what: str) -> xr.DataArray:
    return xr.DataArray(
        lines,
        {"network": names, "blur": list(SMOOTH)},
        ["network", "blur"],
        name="Gaussian CKA",
        attrs={"title": f"how alike both views are to {what}, by the blur in pixels"},
    )
