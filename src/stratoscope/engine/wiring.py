"""Wiring: which components of a model can send to which inputs of later ones, numbered and named.

Senders, in order of computation: "embed" (all that enters layer 0), every query head "L3H2", every
MLP "L3 mlp".
Receivers: the query, key and value input of every query head "L3H2.q", ".k", ".v", every MLP's
input "L3 mlp", and "logits", the input of the read-out. `engine.edges` says what an edge between
them is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.models import source
from stratoscope.models.lm import LM

SIDES = "qkv"
# senders and receivers, as numbers in `Wiring`'s lists: one edge, or several senders and receivers
# changed together
Path = tuple[tuple[int, ...], tuple[int, ...]]
Names = str | Sequence[str]


@dataclass(frozen=True)
class Wiring:
    """Who can send to whom. Senders are numbered in order of computation: those before a receiver
    are the first n."""

    layers: int
    heads: int
    parallel: bool

    @cached_property
    def senders(self) -> list[str]:
        per_layer = [
            [*(f"L{n}H{h}" for h in range(self.heads)), f"L{n} mlp"] for n in range(self.layers)
        ]
        return ["embed", *(name for layer in per_layer for name in layer)]

    @cached_property
    def receivers(self) -> list[str]:
        inputs = [
            [*(f"L{n}H{h}.{s}" for h in range(self.heads) for s in SIDES), f"L{n} mlp"]
            for n in range(self.layers)
        ]
        return [*(name for layer in inputs for name in layer), "logits"]

    def head(self, layer: int) -> int:
        """The number of the layer's first head as a sender, so also how many come before; its MLP
        follows its last."""
        return 1 + layer * (self.heads + 1)

    def place(self, receiver: int) -> tuple[int, int]:
        """(layer, number within it): 3 * head + side, then the MLP. Logits are alone in a layer
        after the last."""
        return divmod(receiver, 3 * self.heads + 1)

    def before(self, receiver: int) -> int:
        """How many senders the receiver hears."""
        layer, inside = self.place(receiver)
        hears_heads = inside == 3 * self.heads and not self.parallel
        return self.head(layer) + (self.heads if hears_heads else 0)

    def inputs(self, sender: int) -> list[int]:
        """The receivers of a component: q, k and v of a head, the one input of an MLP. The
        embedding (0) has none."""
        layer, inside = divmod(sender - 1, self.heads + 1)
        start = layer * (3 * self.heads + 1) + 3 * inside
        return (
            []
            if sender == 0
            else [start]
            if inside == self.heads
            else [start, start + 1, start + 2]
        )

    @cached_property
    def mask(self) -> Bool[Tensor, "receiver sender"]:
        """Which pairs are edges."""
        count = torch.tensor([self.before(r) for r in range(len(self.receivers))])
        return torch.arange(len(self.senders)) < count[:, None]

    @property
    def edges(self) -> list[Path]:
        """Every edge, in the order of `mask`: by receiver, then sender."""
        return [((sender,), (receiver,)) for receiver, sender in self.mask.nonzero().tolist()]

    def paths(self, named: Sequence[tuple[Names, Names]]) -> list[Path]:
        """Read (senders, receivers) by name; "L3H2" as a receiver means its q, k and v.

        Raises InputError for an unknown name, or a path none of whose senders comes before any of
        its receivers.
        """
        sender, receiver = (
            {name: n for n, name in enumerate(names)} for names in (self.senders, self.receivers)
        )
        counts, paths = self.mask.sum(dim=1).tolist(), []
        for senders, receivers in named:
            ends = [
                [names] if isinstance(names, str) else list(names) for names in (senders, receivers)
            ]
            heads = [
                [f"{n}.{s}" for s in SIDES] if re.fullmatch(r"L\d+H\d+", n) else [n]
                for n in ends[1]
            ]
            path = (
                tuple(_number(n, sender, "sender") for n in ends[0]),
                tuple(_number(n, receiver, "receiver") for names in heads for n in names),
            )
            if not any(s < counts[r] for s in path[0] for r in path[1]):
                raise InputError(
                    f"{senders!r} -> {receivers!r} is no path: every receiver is computed before "
                    "the senders."
                )
            paths.append(path)
        return paths

    def coords(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Coordinates of an `edge` axis: sender, receiver, and their layers (embed -1, logits the
        number of layers)."""
        senders, receivers = self._named(paths, 0), self._named(paths, 1)
        return {
            "edge": [f"{sender} -> {receiver}" for sender, receiver in zip(senders, receivers)],
            "sender": (("edge",), senders),
            "receiver": (("edge",), receivers),
            "sender_layer": (("edge",), [(min(path[0]) - 1) // (self.heads + 1) for path in paths]),
            "receiver_layer": (("edge",), [max(path[1]) // (3 * self.heads + 1) for path in paths]),
        }

    def _named(self, paths: Sequence[Path], end: int) -> list[str]:
        names = (self.senders, self.receivers)[end]  # a property that spells them: asked for once
        return [
            names[path[end][0]] if len(path[end]) == 1 else " + ".join(names[n] for n in path[end])
            for path in paths
        ]


def _number(name: str, numbers: dict[str, int], what: str) -> int:
    if name not in numbers:
        *some, last = numbers
        raise InputError(
            f"{name!r} is no {what} here: they run {', '.join(some[:3])} ... {some[-1]}, {last}."
        )
    return numbers[name]


def wiring(lm: LM) -> Wiring:
    """The wiring of a model. Raises SiteError when its stream is no sum, or its attention cannot be
    opened."""
    lm.layout.resolve(["layers.*.attn.q", "layers.*.attn.z", "layers.*.mlp.out", "logits"])
    residual = lm.family.towers[""].residual
    if residual == "post-norm":
        raise SiteError(
            f"{lm.family.name} norms or scales its residual stream after additions, so it is not a "
            "sum of what components "
            f"write: edges do not exist for it. Use layers.activation_patching."
        )
    source.refuse(
        lm,
        "its stream is not the sum of what heads and MLPs write, so edges do not exist for it. "
        "Use heads.activation_patching",
    )
    if lm.layout.gated:
        raise SiteError(
            f"in {lm.family.name} a gate stands between what a head attends to and what it writes, "
            "so a changed query, key "
            "or value alone does not tell a head's write: edges do not exist for it. Use "
            "heads.activation_patching."
        )
    return Wiring(lm.dims.layers, lm.dims.heads, residual == "parallel")
