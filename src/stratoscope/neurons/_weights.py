"""What neurons read and write, as directions of the residual stream, and such directions read as
tokens.

A norm on the way is taken as its weight, and LayerNorm's centring; its scale, which depends on the
input, and its bias are left out. So a direction's logits order the tokens; their size means
something only beside those of the same direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import freeze
from stratoscope.models.lm import LM
from stratoscope.models.weights import matrix

Side = Literal["down", "up", "gate"]
Units = tuple[list[int], list[int]]


def weighed(norm: nn.Module | None, write: Float[Tensor, "unit dim"]) -> Float[Tensor, "unit dim"]:
    """A vector through a norm's weight and centring, its scale left out."""
    frozen = freeze(norm, write)
    return replace(frozen, scale=torch.ones_like(frozen.scale)).linear(write)


def before(norm: nn.Module | None, read: Float[Tensor, "unit dim"]) -> Float[Tensor, "unit dim"]:
    """The direction of a norm's input that a vector reads of its output: the transposed map of
    `weighed`."""
    frozen = freeze(norm, read)
    scaled = read * frozen.weight
    return scaled - scaled.mean(dim=-1, keepdim=True) if frozen.centred else scaled


def decode(lm: LM, directions: Float[Tensor, "unit dim"]) -> Float[Tensor, "unit vocab"]:
    """Logits of directions of the residual stream: final norm's weight, then the unembedding."""
    return weighed(lm.layout.final_norm, directions.float()) @ lm.weight("logits").float().T


def directions(lm: LM, layer: int, side: Side, *, fold: bool = True) -> Float[Tensor, "neuron dim"]:
    """One row for each neuron of a layer.

    down: what it adds at activation one. up, gate: its weights on the stream; where the MLP has no
    gate these are the same. fold: with the weight of the norm between neuron and stream. Raises
    SiteError where there is no such matrix.
    """
    [site] = lm.layout.resolve(f"layers.{layer}.mlp.out")
    if side == "down":
        write, post = lm.weight(site).T, lm.layout.writers(site)[1:]
        return weighed(post[0], write) if post and fold else write
    read = _entrance(lm, int(site.layer), side)
    return before(pre_norm(lm, int(site.layer)), read) if fold else read


def pre_norm(lm: LM, layer: int) -> nn.Module | None:
    """The norm between the residual stream and a layer's MLP, or None; known by its numbers, on
    four tokens.

    Raises SiteError when no module of the layer turns the stream into what the MLP reads.
    """
    parallel = lm.family.towers[""].residual == "parallel"
    stream, pre = (
        f"layers.{layer}.{'resid_pre' if parallel else 'resid_mid'}",
        f"layers.{layer}.mlp.pre",
    )
    with lm.taps.only():  # of the weights: changes made outside are none of them
        seen = capture(lm, [[i % lm.dims.vocab for i in range(4)]], stream, pre)
    module, point = lm.layout.locate(lm.layout.resolve_one(pre))
    inside = lm.layout.layers[""][layer].modules()
    sized = [
        m for m in inside if getattr(getattr(m, "weight", None), "shape", None) == (lm.dims.dim,)
    ]
    for norm in (None, *sized):
        values = module.forward(seen[stream] if norm is None else norm.forward(seen[stream]))
        values = (
            values if point.part is None else values.chunk(point.part[1], dim=-1)[point.part[0]]
        )
        if torch.allclose(values, seen[pre], rtol=1e-3, atol=1e-3 * float(seen[pre].abs().max())):
            return norm
    raise SiteError(
        f"layer {layer} of {lm.family.name}: no norm turns its residual stream into what its MLP "
        "reads."
    )


def linear(lm: LM) -> None:
    """Raise SiteError where no linear way leads from a neuron to a vocabulary of tokens."""
    lm.layout.resolve(["layers.*.mlp.act", "logits"])
    if (
        lm.family.towers[""].residual == "post-norm"
        or len(lm.layout.head) != 1
        or not lm.family.reads_ids
    ):
        raise SiteError(
            f"{lm.family.name} has no linear way from a neuron to a vocabulary of tokens."
        )


def units(lm: LM, inputs: Sequence[Sequence[int]]) -> Units:
    """The layers and neurons asked for. Raises SiteError or InputError for what is not there."""
    given = [tuple(unit) for unit in inputs]
    if not given or any(len(unit) != 2 for unit in given):
        raise InputError(
            f"neurons are given as (layer, neuron), at least one; got {list(inputs)!r:.80}."
        )
    sites = [lm.layout.resolve(f"layers.{layer}.mlp.act")[0] for layer, _ in given]
    for site, (_, neuron) in zip(sites, given):
        if not 0 <= neuron < lm.dims.neurons:
            raise InputError(
                f"neuron {neuron} of layer {site.layer}: this model has 0 to {lm.dims.neurons - 1}."
            )
    return [int(site.layer) for site in sites], [neuron for _, neuron in given]


def _entrance(lm: LM, layer: int, side: Side) -> Float[Tensor, "neuron dim"]:
    """W_up or W_gate: the gate is what the activation function takes; up is its other half, or the
    MLP's other matrix."""
    pre = lm.layout.resolve_one(f"layers.{layer}.mlp.pre")
    module, point = lm.layout.locate(pre)
    gate = lm.weight(pre)
    if side == "gate":
        return gate
    if point.part is not None:
        chunk, n = point.part
        return matrix(module).chunk(n)[n - 1 - chunk]
    parent = lm.layout.layer(pre).get_submodule(point.path.rpartition(".")[0])
    others = [
        m for m in parent.children() if m is not module and getattr(m, "weight", None) is not None
    ]
    same = [matrix(m) for m in others if m.weight.ndim == 2 and matrix(m).shape == gate.shape]
    return same[0] if same else gate
