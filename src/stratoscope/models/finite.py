"""What is no number is refused by name, before a method makes a rank, a share or a null of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stratoscope.errors import InputError

# what a query may not read, and what may not be said
_MAY_BE_INFINITE = "attn.scores", "cross.scores", "logits"


def refuse(values: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
    """Raise InputError for the first value that is not a number, or infinite where it may not be.

    values: by site, or by what a person calls it, the first axis the example where `mask` is given.
    mask: (example, position) of what is real: in padding anything may stand. One look at the device
    when all is well.
    """
    floats = {name: x for name, x in values.items() if x.is_floating_point() and x.numel()}
    flags = [_wrong(name, x).any().cpu() for name, x in floats.items()]
    if not flags or not bool(torch.stack(flags).any()):
        return
    for (name, x), flag in zip(floats.items(), flags):
        if not flag:
            continue
        places = _wrong(name, x).nonzero()
        if mask is not None and x.ndim > 1 and x.shape[:2] == mask.shape:
            places = places[mask.to(x.device)[places[:, 0], places[:, 1]]]
        elif mask is not None and x.ndim == 4 and (x.shape[0], x.shape[2]) == mask.shape:
            # head before query
            places = places[mask.to(x.device)[places[:, 0], places[:, 2]]]
        if len(places):
            at = tuple(places[0].tolist())
            raise InputError(
                f"{name} is {float(x[at])} at {at}: not a number to measure with. Look for broken "
                "weights, a value put "
                "there by an intervention, or, in float16, one above 65504 (load in bfloat16 or "
                "float32)."
            )


def _wrong(name: str, x: Tensor) -> Tensor:
    return x.isnan() if name.endswith(_MAY_BE_INFINITE) else ~x.isfinite()
