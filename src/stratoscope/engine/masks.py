"""Weight masks: which single weights of a model are kept, as a value that can be saved, applied and
compared.

Those that may be left out are the matrices of attention and MLP in every layer of the main stack;
biases, norms, embeddings and the read-out are always kept.

    with applied(lm, mask): lm(prompts)             # an `Edit`; invert=True: without these weights
    random_like(mask, seed=1)                       # as many weights in each matrix, at random
    largest_like(lm, mask)                          # as many, the largest

`engine.mask_search` finds the weights that a task needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.weights import quantised
from stratoscope.store.fitted import Fitted

ATTENTION, MLP = COMPONENTS = ("attn", "mlp")


class Matrix(NamedTuple):
    """A weight matrix that may be masked: the layer and the component that it belongs to."""

    layer: int
    component: str
    weight: nn.Parameter


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask(Fitted):
    """Which weights are kept: of every matrix, by the parameter's name, True where it is.

    story: of a search, how many steps it took, the share of weights that were undecided at its end,
    and the loss on the way.
    """

    keep: Mapping[str, Bool[Tensor, "..."]]
    story: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return sum(int(keep.sum()) for keep in self.keep.values())

    @property
    def size(self) -> int:
        """How many weights may be kept or not."""
        return sum(keep.numel() for keep in self.keep.values())

    def __repr__(self) -> str:
        return f"Mask({self.kept:,} of {self.size:,} weights kept)"


def matrices(lm: LM) -> dict[str, Matrix]:
    """The matrices of attention and MLP of every layer of the main stack, by parameter name.

    Raises SiteError for layers without attention, InputError for quantised weights.
    """
    lm.layout.resolve("layers.*.attn.q")
    if quantised(lm.model):
        raise InputError(
            "some weights of this model are quantised, so a single one cannot be left out: load it "
            "in float32 or bfloat16."
        )
    names = {id(value): name for name, value in lm.model.named_parameters()}
    found: dict[str, Matrix] = {}
    for number, layer in enumerate(lm.layout.layers[""]):
        attention = {id(weight) for weight in _attention(lm, number)}
        tables = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Embedding)}
        for weight in layer.parameters():
            if weight.ndim >= 2 and id(weight) not in tables:
                component = ATTENTION if id(weight) in attention else MLP
                # a matrix that several layers share is the first's
                found.setdefault(names[id(weight)], Matrix(number, component, weight))
    return found


def _attention(lm: LM, layer: int) -> Iterator[nn.Parameter]:
    """What belongs to attention, to other towers too: what asks the seam, and what writes for
    it."""
    for kind in ("attn", "cross"):
        asks, writes = (Site("", layer, f"{kind}.{point}") for point in ("q", "out"))
        if lm.layout.lack(asks) is None:
            yield from lm.layout.attention(asks).parameters()
        if lm.layout.lack(writes) is None and lm.layout.write(writes):
            for module in lm.layout.writers(writes):
                yield from module.parameters()


@torch.no_grad()
def applied(lm: LM, mask: Mask, *, invert: bool = False) -> Edit:
    """The model with the kept weights alone, the others 0, as an edit; invert: without them.

    Raises InputError for a mask of other matrices than the model's.
    """
    found = matrices(lm)
    shapes = {name: tuple(matrix.weight.shape) for name, matrix in found.items()}
    given = {name: tuple(keep.shape) for name, keep in mask.keep.items()}
    if differing := sorted(name for name in shapes | given if shapes.get(name) != given.get(name)):
        name = differing[0]
        raise InputError(
            f"this mask is of another model: `{name}` is {given.get(name, 'absent')} there and "
            f"{shapes.get(name, 'absent')} here ({len(differing)} such)."
        )
    deltas = {}
    for name, keep in mask.keep.items():
        weight = found[name].weight.detach()
        off = keep.to(weight.device) ^ (not invert)
        if bool(off.any()):
            deltas[name] = -weight * off
    what = "without" if invert else "with"
    return Edit(lm, (), deltas, note=f"{what} {mask.kept} of {mask.size} weights")


# --- masks to compare with ------------------------------------------------------------------------


def random_like(mask: Mask, seed: int) -> Mask:
    """As many weights in every matrix, at random."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(keep.shape, generator=generator) for name, keep in mask.keep.items()}
    return _highest(mask, scores, "random", seed)


def largest_like(lm: LM, mask: Mask) -> Mask:
    """As many weights in every matrix, the largest by size."""
    sizes = {name: matrix.weight.detach().abs() for name, matrix in matrices(lm).items()}
    return _highest(mask, sizes, "largest", mask.seed)


def _highest(mask: Mask, scores: Mapping[str, Tensor], chosen: str, seed: int | None) -> Mask:
    keep = {}
    for name, like in mask.keep.items():
        row = torch.zeros(like.numel(), dtype=torch.bool)
        row[scores[name].flatten().topk(int(like.sum())).indices.cpu()] = True
        keep[name] = row.view(like.shape)
    settings = {"chosen": chosen, "like": dict(mask.settings)}
    return replace(mask, keep=keep, story={}, settings=settings, seed=seed)


def shared(one: Mask, other: Mask) -> float:
    """The share of the weights that one keeps which the other keeps too. Raises InputError for
    masks of different models, or where one keeps nothing."""
    pairs = _pairs(one, other)
    return sum(int((a.cpu() & b.cpu()).sum()) for a, b in pairs) / one.kept


def chance_shared(
    one: Mask, other: Mask, *, draws: int = 1000, seed: int = 0
) -> Float[np.ndarray, " draw"]:
    """The same where each keeps as many weights in every matrix, at random."""
    generator, total = np.random.default_rng(seed), np.zeros(draws)
    for a, b in _pairs(one, other):
        first, second = int(a.sum()), int(b.sum())
        total += generator.hypergeometric(first, a.numel() - first, second, size=draws)
    return total / one.kept


def _pairs(one: Mask, other: Mask) -> list[tuple[Tensor, Tensor]]:
    shapes = [{n: tuple(k.shape) for n, k in mask.keep.items()} for mask in (one, other)]
    if shapes[0] != shapes[1] or not one.kept:
        raise InputError(
            f"{one} and {other} cannot be compared: masks of one model are asked for, and the "
            "first must keep something."
        )
    return [(keep, other.keep[name]) for name, keep in one.keep.items()]
