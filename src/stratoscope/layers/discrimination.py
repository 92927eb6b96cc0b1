"""Discrimination: how far apart classes lie at every depth of the stream, the generalized
discrimination value (GDV).

Paper: word-class-emergence

    gdv[depth]   = intra[depth] - inter[depth]
    intra[depth] = mean over classes of the mean distance between two examples of the class     /
        sqrt(dim)
    inter[depth] = mean over pairs of classes of the mean distance between examples of the two  /
        sqrt(dim)

Every dimension is first z-scored over all examples and halved. This is the measure of Schilling et
al. (2021, Neural Networks 139, 278-293; arXiv:1811.01753), with the population's deviation as in
their own routine. It does not change when dimensions are moved, scaled, reordered or all repeated.
depth counts the layers passed: 0 is the embedding.

0 is no clustering. For L classes of equal size the least is -sqrt(L / (2 (L - 1))): -1 for two,
-0.75 for nine. Classes of unequal size can go below it, so compare depths and models on the same
examples, not numbers of different data.

null: the same for labels shuffled among the examples.
Reads as: the more negative, the more of the whole space is spent on telling these classes apart.
Does not show whether a class can be read: every dimension weighs alike, and a class that a few of
many dimensions hold leaves this near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "labels shuffled among the examples"


def generalized_discrimination(
    x: Float[Tensor, "example dim"], labels: Int[Tensor, " label"]
) -> float:
    """The generalized discrimination value; labels: the number of each example's class, as many as
    examples.

    Raises InputError for fewer than two classes, a class with one example, or labels that are not
    one for each.
    """
    intra, inter = separation(distances(x), labels)
    return intra - inter


def distances(x: Float[Tensor, "example dim"]) -> Float[Tensor, "example example"]:
    """Distances / sqrt(dim) after every dimension is z-scored over the examples and halved.

    A dimension that varies by no more than rounding does, a millionth of its largest value, is 0
    for all.
    """
    x = x.double()
    away, spread = x - x.mean(dim=0), x.std(dim=0, correction=0)
    z = torch.where(spread > 1e-6 * x.abs().amax(dim=0), away / (2 * spread), 0.0)
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5


def separation(
    distance: Float[Tensor, "example example"], labels: Int[Tensor, " label"]
) -> tuple[float, float]:
    """Mean distance within the classes and between them, each class and each pair of classes
    counting once.

    Raises InputError as `generalized_discrimination` does.
    """
    if len(labels) != len(distance):
        raise InputError(f"{len(labels)} labels for {len(distance)} examples: give one for each.")
    kinds, number = labels.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(number).to(distance)
    size = member.sum(dim=0)
    if len(kinds) < 2 or size.min() < 2:
        raise InputError(
            f"classes of {size.int().tolist()} examples: there must be two or more, each of at "
            "least two."
        )
    # an example and itself: no pair
    mean = (member.T @ distance @ member) / (torch.outer(size, size) - size.diag())
    same = torch.eye(len(kinds), dtype=torch.bool)
    return mean[same].mean().item(), mean[~same].mean().item()


def shares(
    distance: Float[Tensor, "example example"], labels: Int[Tensor, " label"]
) -> Float[np.ndarray, " example"]:
    """Jackknife pseudo-values of the generalized discrimination value: their mean is the value, and
    `maths.resample.interval` of them its interval.

        share[i in class k] = gdv + n / n_k (2 (near[i] - mean_kk) / K
                                             - 2 / (K (K - 1)) sum over l of (far[i, l] - mean_kl))

    near[i] and far[i, l] are the mean distances to the others of its class and to class l. A mean
    over pairs is a U-statistic of order 2, so that within its class an example counts twice about
    the mean; a bootstrap of examples would count distances to oneself. That every dimension is
    z-scored over the same examples is left out. Raises InputError as `generalized_discrimination`
    does.
    """
    intra, inter = separation(distance, labels)
    groups, number = labels.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(number).to(distance)
    size, kinds = member.sum(dim=0), len(groups)
    rows, own = distance @ member, member.bool()  # rows: (example, class)
    means = (member.T @ rows) / (torch.outer(size, size) - size.diag())
    near, far = rows[own] / (size[number] - 1), rows / size
    away = (near - means[number, number]) / kinds
    apart = torch.where(own, 0.0, far - means[number]).sum(dim=1) * 2 / (kinds * (kinds - 1))
    weight = len(labels) / size[number]
    return (intra - inter + weight * (2 * away - apart)).numpy()


def by_depth(
    states: Sequence[Float[Tensor, "example _"]],
    labels: Int[Tensor, " label"],
    *,
    draws: int = 100,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "depth *draw"]]:  # noqa: F821
    """intra, inter, gdv (depth) and null (depth, draw), for states of any network, first depth
    first.

    The same `draws` shuffles are used at all depths. Raises InputError as
    `generalized_discrimination` does.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(draws)]
    rows = [
        [separation(distance, mix) for mix in (labels, *shuffled)]
        for distance in map(distances, states)
    ]
    intra, inter = np.moveaxis(np.array(rows), 2, 0)  # each (depth, 1 + draw)
    return {
        "intra": intra[:, 0],
        "inter": inter[:, 0],
        "gdv": (intra - inter)[:, 0],
        "null": (intra - inter)[:, 1:],
    }


@torch.no_grad()
def stream(
    lm: LM, inputs: Any, *, position: int | None = -1, batch: int = 16
) -> list[Float[Tensor, "token depth dim"]]:
    """Of each input the residual stream of one token, or of all (None), at every depth; `batch`
    inputs at a time."""
    ids, mask = lm.batch(inputs).text
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask)]
    positions, states_of = None if position is None else [position], []
    for some in (rows[start : start + batch] for start in range(0, len(rows), batch)):
        seen = capture(lm, some, "layers.0.resid_pre", "layers.*.resid_post", positions=positions)
        states = torch.cat(
            [seen["layers.0.resid_pre"][None], seen.stack("layers.*.resid_post")]
        ).transpose(0, 1)
        lengths = [len(row) if position is None else 1 for row in some]
        states_of += [
            state[:, :length].transpose(0, 1).cpu() for state, length in zip(states, lengths)
        ]
    return states_of


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[str] | Sequence[int] | None = None,
    position: int | None = None,
    draws: int = 100,
    batch: int = 16,
    seed: int = 0,
) -> xr.Dataset:
    """gdv, intra, inter, null, the mean of the shuffles (depth), and null_draws (draw, depth).

    labels: the class of each input (default: each input its own). position: the token that stands
    for an input, -1 its last, which the paper reads; by default each of its tokens is an example.
    draws: shuffles. batch: inputs in one forward pass. Raises InputError as
    `generalized_discrimination` does, and for a position that an input lacks.
    """
    tokens = stream(lm, inputs, position=position, batch=batch)
    kinds = list(range(len(tokens))) if labels is None else list(labels)
    if len(kinds) != len(tokens):
        raise InputError(f"{len(kinds)} labels for {len(tokens)} inputs: give one for each.")
    names, numbers = np.unique(kinds, return_inverse=True)
    each = torch.tensor(numbers).repeat_interleave(torch.tensor([len(rows) for rows in tokens]))
    result = by_depth(list(torch.cat(tokens).unbind(dim=1)), each, draws=draws, seed=seed)
    sizes = {str(name): int(count) for name, count in zip(names, each.bincount())}
    return dataset(
        {name: (("depth",), result[name]) for name in ("gdv", "intra", "inter")}
        | {
            "null": (("depth",), result["null"].mean(axis=1)),
            "null_draws": (("draw", "depth"), result["null"].T),
        },
        method="layers.discrimination",
        provenance=lm.provenance,
        settings={"position": position, "draws": draws, "classes": sizes},
        seed=seed,
        coords={"depth": list(range(len(result["gdv"])))},
        null_kind=NULL,
    )
