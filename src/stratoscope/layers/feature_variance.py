"""Feature variance: how much of what stands at each depth goes with each of some named labels.

Paper: representation-bias

    explained[depth, label] = |Q' x|^2 / |x|^2      x (example, dim), its mean taken out
        Q: an orthonormal basis of what the label says (kinds: which one; numbers: a line)
    together[depth]         = the same for all labels at once;  1 - together is the residual
    unique[depth, label]    = together - the same for all the others

Independent labels share out `together` among them; where labels go together (a true sentence is
also longer), `explained` counts what they share for each, `unique` for none. `top[depth, rank,
label]` is how much of each of the largest principal components goes with the label, `size[depth,
rank]` how much of the variance that component is.

null_explained: labels dealt out anew. On average it is columns / (texts - 1), whatever the states,
so a label of many kinds needs many texts. The interval is over texts, first order in what the
fit itself owes to chance: near 0 look at the null instead.

Reads as: how large a label is written. Does not show how well it can be read, nor that the model
uses it: a feature of 2 % may be as open to a linear reader and as much used as one of 50 %
(`layers.concept_depth` reads). That is the paper's point.
Cost: one forward pass up to the last layer, then one product for each label and draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.layers import concept_depth
from stratoscope.maths import resample
from stratoscope.models.lm import LM
from stratoscope.results import dataset

AXES = {"label": "one of the named labels of the texts"}
Label = Sequence[Any] | np.ndarray | Tensor  # one for each text
NULL = "labels dealt out anew among the texts"


def basis(*labels: Label) -> Float[Tensor, "example column"]:
    """An orthonormal basis of what labels say of each text beside a constant: one column fewer than
    there are kinds, or one for a label of numbers with a fraction (floats)."""
    columns = torch.cat([_columns(label) for label in labels], dim=1)
    left, size, _ = torch.linalg.svd(columns - columns.mean(dim=0), full_matrices=False)
    return left[:, size > 1e-9 * size.max()] if len(size) else left


def share(
    x: Float[Tensor, "example *place dim"], q: Float[Tensor, "example column"]
) -> Float[Tensor, "*place"]:
    """The share of the variance of x, its mean over examples taken out, that lies in the span of q;
    0 where nothing varies."""
    away = x.double() - x.double().mean(dim=0)
    inside = torch.tensordot(q.to(away).T, away, dims=1).square().sum(dim=(0, -1))
    return (inside / away.square().sum(dim=(0, -1)).clamp_min(1e-300)).clamp(max=1.0)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    labels: Mapping[str, Label],
    draws: int = 20,
    components: int = 5,
    seed: int = 0,
) -> xr.Dataset:
    """explained, low, high, unique (depth, label), together (depth), null_explained (draw, depth,
    label), size (depth, rank) and top (depth, rank, label).

    inputs: texts, read at their last token, or states (example, depth, dim) of anything: hidden
    layers of a net, another token, what `layers.concept_depth.states` gave. labels: name -> one for
    each text; floats are numbers on a line, all else kinds. low, high: 95 %, over texts. draws,
    seed: of the null; components: how many of the largest. Raises InputError for labels of another
    length, of one kind only, or of so many kinds that half of the texts would be explained anyway.
    """
    if draws < 0 or components < 0:
        raise InputError(f"draws={draws}, components={components}: 0 or more of each.")
    given = isinstance(inputs, Tensor) and inputs.is_floating_point()
    if given and inputs.ndim != 3:
        raise InputError(f"states of shape {tuple(inputs.shape)}: they are (example, depth, dim).")
    x = (inputs if given else concept_depth.states(lm, inputs)).double()
    bases, every = _bases(labels, len(x))
    away = x - x.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(draws)]
    null = [[share(x, q[order]) for q in bases] for order in orders]
    together = share(x, every)
    others = [_without(labels, name, len(x)) for name in labels]
    spread = [[_interval(away[:, depth], q) for q in bases] for depth in range(x.shape[1])]
    size, top = _components(away, bases, components)
    axes, count = ("depth", "label"), (x.shape[1], len(bases))
    return dataset(
        {
            "explained": (axes, torch.stack([share(x, q) for q in bases], dim=1)),
            "low": (axes, [[one.low for one in row] for row in spread]),
            "high": (axes, [[one.high for one in row] for row in spread]),
            "unique": (axes, torch.stack([together - share(x, q) for q in others], dim=1)),
            "together": (("depth",), together),
            "null_explained": (("draw", *axes), _stacked(null, count)),
            "size": (("depth", "rank"), size),
            "top": (("depth", "rank", "label"), top),
        },
        method="layers.feature_variance",
        provenance=lm.provenance,
        settings={"draws": draws, "components": components, "texts": len(x)},
        seed=seed,
        coords={"depth": list(range(x.shape[1])), "label": list(labels)},
        null_kind=NULL,
    )


def _columns(label: Label) -> Float[Tensor, "example column"]:
    values = list(label) if isinstance(label, Sequence) else label.tolist()
    if values and all(isinstance(value, float) for value in values):
        return torch.tensor(values, dtype=torch.float64)[:, None]
    kinds = {value: number for number, value in enumerate(dict.fromkeys(values))}
    index = torch.tensor([kinds[value] for value in values], dtype=torch.long)
    return torch.nn.functional.one_hot(index, len(kinds)).double()


def _bases(labels: Mapping[str, Label], n: int) -> tuple[list[Tensor], Tensor]:
    """One basis for each label, and one for all together."""
    if not labels:
        raise InputError("labels={}: give at least one, as {'name': [one for each text]}.")
    for name, label in labels.items():
        if len(label) != n:
            raise InputError(f"label {name!r} has {len(label)} values for {n} texts: one for each.")
        if not bool(torch.isfinite(_columns(label)).all()):
            raise InputError(
                f"label {name!r} holds a number that is not finite: leave its text out."
            )
    bases = [basis(label) for label in labels.values()]
    for name, q in zip(labels, bases):
        if not q.shape[1]:
            raise InputError(
                f"label {name!r} is the same for all {n} texts: it can explain nothing."
            )
    every = basis(*labels.values())
    if 2 * every.shape[1] > n - 1:
        raise InputError(
            f"the labels say {every.shape[1]} independent things of {n} texts, and would explain "
            f"{every.shape[1] / (n - 1):.0%} of anything: give more texts, or coarser labels."
        )
    return bases, every


def _without(labels: Mapping[str, Label], name: str, n: int) -> Float[Tensor, "example c"]:
    rest = [label for other, label in labels.items() if other != name]
    return basis(*rest) if rest else torch.zeros(n, 0, dtype=torch.float64)


def _interval(
    away: Float[Tensor, "example dim"], q: Float[Tensor, "example column"]
) -> resample.Interval:
    """Of a ratio of sums over texts. How the fit itself varies does not count: it is at its best
    already, so that a small change of it changes the share by less than that."""
    q = q.to(away)
    whole = away.square().sum(dim=1)
    off = (away - q @ (q.T @ away)).square().sum(dim=1)
    return resample.interval((whole - off).cpu(), whole.cpu(), method="t")


def _components(
    away: Float[Tensor, "example depth dim"], bases: Sequence[Tensor], count: int
) -> tuple[Float[Tensor, "depth rank"], Float[Tensor, "depth rank label"]]:
    """The largest principal components' shares of the variance, and of each what goes with each
    label."""
    count = min(count, len(away) - 1, away.shape[2])
    left, size, _ = torch.linalg.svd(away.transpose(0, 1), full_matrices=False)
    power = size.square()
    scores = left[:, :, :count]  # (depth, example, rank), unit columns
    top = [(q.to(away).T @ scores).square().sum(dim=1) for q in bases]
    shares = power[:, :count] / power.sum(dim=1, keepdim=True).clamp_min(1e-300)
    return shares, torch.stack(top, dim=-1)


def _stacked(null: Sequence[Sequence[Tensor]], count: tuple[int, int]) -> np.ndarray:
    if not null:
        return np.empty((0, *count))
    return torch.stack([torch.stack(list(row), dim=1) for row in null]).cpu().numpy()
