"""Two views of the same pictures, in every layer of any torch network: features, and how alike.

    features(net, parts, x)            one row for each picture, for each named part
    aligned(net, parts, x, others)     CKA and RSA of x and each other view of it, layer by layer

The network may be any that takes pictures; parts are the names of its modules, as
`net.named_modules()` gives them. `embeddings.similarity` is what compares, and its `measure` does
the same for a model of the house, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.embeddings import similarity
from stratoscope.errors import InputError

KINDS = ("linear", "rbf", "rsa")
Pictures = Float[Tensor, "example channel row column"]


@torch.no_grad()
def features(
    net: nn.Module, parts: Sequence[str], x: Pictures, *, cells: int = 8, batch: int = 50
) -> list[Float[np.ndarray, "example feature"]]:
    """What each part gives of each picture, flattened; a map of features is first averaged to at
    most `cells` rows and columns. The network stays in the mode it is in.

    Raises InputError for a part that is not there, or that gives nothing of this kind.
    """
    modules = dict(net.named_modules())
    if missing := [part for part in parts if part not in modules]:
        near = ", ".join(list(modules)[1:7])
        raise InputError(f"parts {', '.join(missing)} are not among {near}, ... of this network.")
    seen: dict[str, list[Tensor]] = {part: [] for part in parts}

    def keep(part: str, given: object) -> None:
        out = given[0] if isinstance(given, tuple) else given
        if not isinstance(out, Tensor) or out.ndim < 2:
            raise InputError(f"{part} gives {type(out).__name__}, no tensor of pictures.")
        if out.ndim == 4:
            size = [min(cells, side) for side in out.shape[2:]]
            out = nn.functional.adaptive_avg_pool2d(out, size)
        seen[part].append(out.flatten(1).float().cpu())

    hooks = [
        modules[part].register_forward_hook(lambda _, __, out, part=part: keep(part, out))
        for part in parts
    ]
    try:
        for some in x.split(batch):
            net(some)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(seen[part]).numpy() for part in parts]


def aligned(
    net: nn.Module, parts: Sequence[str], x: Pictures, others: Sequence[Tensor], *, cells: int = 8
) -> dict[str, Float[np.ndarray, "view part"]]:
    """linear, rbf, rsa of x and each other view of the same pictures, in each part; and each with
    `shuffled_` before it, where every picture is compared with the next one's other view.

    Raises InputError as `features` does, and for views that have not the same pictures.
    """
    if any(len(other) != len(x) for other in others):
        counts = [len(other) for other in others]
        raise InputError(f"{len(x)} pictures and views of {counts}: give as many in each.")
    compare = {"linear": similarity.cka, "rbf": similarity.cka, "rsa": similarity.rsa}
    kernels = {
        "linear": similarity.linear,
        "rbf": similarity.rbf,
        "rsa": similarity.distances,
    }
    views = [features(net, parts, view, cells=cells) for view in (x, *others)]
    found: dict[str, list[list[float]]] = {}
    for kind in KINDS:
        one, *rest = [[kernels[kind](layer) for layer in view] for view in views]
        rows = [[compare[kind](a, b) for a, b in zip(one, two)] for two in rest]
        next_one = np.roll(np.arange(len(x)), 1)
        mixed = [
            [compare[kind](a, b[np.ix_(next_one, next_one)]) for a, b in zip(one, two)]
            for two in rest
        ]
        found |= {kind: rows, f"shuffled_{kind}": mixed}
    return {name: np.array(rows) for name, rows in found.items()}
