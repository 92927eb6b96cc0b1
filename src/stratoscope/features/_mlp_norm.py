"""The norm through which an MLP reads the stream, found in a run, held at what it read there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.places import MLPInput, heard
from stratoscope.engine.trace import capture
from stratoscope.errors import SiteError
from stratoscope.maths.norm import FrozenNorm, freeze
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.taps import Hook


def held_norm(
    lm: LM, at: MLPInput, one: Batch, stream: Float[Tensor, "position dim"]
) -> FrozenNorm:
    """The norm before the MLP at every position of one example, whose stream there is given.

    It is the module of the layer whose output is the very tensor that the MLP is given. Raises
    SiteError where there is none, FamilyError where it is neither a RMSNorm nor a LayerNorm.
    """
    outputs: dict[nn.Module, Tensor] = {}
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[module] = output

    with ExitStack() as listening:
        for module in lm.layout.layer(at.pre).modules():
            hook = module.register_forward_hook(Hook(lm.taps, keep))
            listening.callback(hook.remove)
        listening.enter_context(heard(lm, at, given.append))
        capture(lm, one, at.pre)
    norms = [m for m, x in outputs.items() if x.data_ptr() == given[0].data_ptr()]
    if not norms:
        raise SiteError(
            f"what `{at}` is on {lm.family.name} is not the output of one norm of the stream, so "
            "that no earlier feature's part of it can be told: it is not linear."
        )
    found = freeze(norms[0], stream)
    gap = (found.linear(stream.float()) + found.bias - given[0].reshape(stream.shape)).abs().max()
    if gap > 1e-3 * given[0].abs().max():
        raise SiteError(
            f"`{at}` on {lm.family.name} is not the norm of the stream before it: it is not linear "
            "in what is written there."
        )
    return found


def at_position(norm: FrozenNorm, position: int) -> FrozenNorm:
    """The norm as it is held at one position, in double."""
    scale = norm.scale[position].double()
    return FrozenNorm(norm.weight.double(), norm.bias.double(), scale, norm.centred)


def unscaled(norm: FrozenNorm) -> FrozenNorm:
    """The norm without its scale: what is the same on any input."""
    return FrozenNorm(norm.weight, norm.bias, torch.ones_like(norm.scale), norm.centred)
