"""What reads the stream at one position: a feature or an answer, through a norm that is held, or
what stands behind a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from stratoscope.engine.alone import Layers
from stratoscope.engine.backwards import through_norm, through_values, to_heads
from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.places import MLPInput, place
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import final_norm
from stratoscope.errors import InputError
from stratoscope.features._mlp_norm import at_position, held_norm, unscaled
from stratoscope.maths.norm import FrozenNorm
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM


@dataclass(frozen=True)
class Reader:
    """What reads the stream at one position of one example, as v . stream + constant.

    unscaled: v before the scale of a norm, the same on any input; NaN behind a head. layers, heads:
    of how many layers the MLPs, and the heads, are heard.
    """

    v: Tensor
    unscaled: Tensor
    scale: Tensor
    constant: Tensor
    total: Tensor
    position: int
    layers: int
    heads: int


def of_feature(
    lm: LM, one: Batch, dictionary: Dictionary, number: int, position: int, parallel: bool
) -> Reader:
    read = cast(MLPInput, place(lm, dictionary.site_in))
    layer = int(read.pre.layer or 0)
    site = f"layers.{layer}.{'resid_pre' if parallel else 'resid_mid'}"
    x = capture(lm, one, site)[site][0].float()
    direction = dictionary.W_enc[:, number].double()
    constant = dictionary.b_enc[number].double() - dictionary.b_dec.double() @ direction
    norm = at_position(held_norm(lm, read, one, x), position)
    return _through(norm, direction, constant, x[position], position, layer, layer + (not parallel))


def of_answer(lm: LM, one: Batch, row: Tensor) -> Reader:
    layers, position = lm.dims.layers, int(lm.readout.positions(one)[0])
    site = f"layers.{layers - 1}.resid_post"
    x = capture(lm, one, site)[site][0].float()
    norm = at_position(final_norm(lm, x), position)
    return _through(norm, row, row.new_zeros(()), x[position], position, layers, layers)


def _through(
    norm: FrozenNorm, direction: Tensor, constant: Tensor, x: Tensor, position: int, layers: int,
    heads: int,
) -> Reader:  # fmt: skip
    v, constant = through_norm(norm, direction), constant + norm.bias @ direction
    flat = through_norm(unscaled(norm), direction)
    total = v @ x.double() + constant
    return Reader(v, flat, norm.scale, constant, total, position, layers, heads)


def behind(lm: LM, one: Batch, reader: Reader, step: Sequence[int]) -> Reader:
    """What a head brings the reader from one position, as what reads the stream there."""
    layer, head, position = (int(x) for x in step) if len(step) == 3 else (-1, 0, 0)
    last = reader.position
    if not (0 <= layer < reader.heads and 0 <= head < lm.dims.heads and 0 <= position <= last):
        raise InputError(
            f"{step!r} in via: give (layer, head, position) of a head that is heard, of layer 0 to "
            f"{reader.heads - 1}, and of what it reads, a position from 0 to {last}."
        )
    names = [f"layers.{layer}.{part}" for part in ("resid_pre", "attn.z", "attn.pattern")]
    x, z, pattern = (x[0] for x in map(capture(lm, one, *names).__getitem__, names))
    layers = Layers(lm, one)
    y = to_heads(lm, layer, z[last, None], reader.v[None])[0, 0, head]
    weight = pattern[head, last, position].double()
    v = weight * through_values(layers, layer, head, x, position, y)
    total = weight * (layers.attention(layer, x[None]).v[0, head, position].double() @ y)
    constant = total - v @ x[position].double()
    none = torch.full_like(v, torch.nan)
    return Reader(v, none, none[0], constant, total, position, layer, layer)
