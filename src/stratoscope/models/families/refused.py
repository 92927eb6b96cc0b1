"""Architectures that are known and cannot be read: each with the reason, so that no guess is made
about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import Family

_RAGGED = (
    "the width and the number of positions change from stage to stage, so that its layers "
    "have no stream in common"
)

REASONS = {
    "albert": "all its layers are one module with the same weights: a hook there cannot tell which "
    "layer is running, and "
    "a change of one layer's weights is a change of all",
    "longformer": "it pads every input to a multiple of its attention window and scores window by "
    "window, so that its "
    "positions are not the batch's and no one pattern exists",
    "squeezebert": "its layers are called past PyTorch's hooks, on a stream laid out (example, "
    "dim, position)",
    "xlnet": "its stream is laid out (position, example, dim), two streams pass through one layer, "
    "and its projections "
    "are parameters, which no hook can see",
    "fnet": "it mixes positions by a Fourier transform: it has no attention and no heads",
    "swin": _RAGGED,
    "swinv2": _RAGGED,
    "hiera": _RAGGED,
    "pvt": _RAGGED,
    "vit_mae": "it shuffles the patches and hides most of them at random in every forward pass, so "
    "that no two runs "
    "see the same picture and a position names another patch each time",
}


def _refuse(name: str, reason: str) -> Callable[[Any], Family]:
    def family(config: Any) -> Family:
        raise FamilyError(f"`{name}` is known, and cannot be read: {reason}; refused.")

    return family


FAMILIES = {name: _refuse(name, reason) for name, reason in REASONS.items()}
