"""Half precision: how large an effect rounding alone can make, and the same model in float32 for
smaller ones.

bfloat16 keeps 8 binary digits: a logit of 20 is known to 0.06, and where the clean and the corrupt
run differ by 1.7 that is an effect of 0.04. `Pair.notes` says so where it matters; then

    exact = in_float32(lm)
    layers.activation_patching.measure(exact, ...)         # any measure, on the same rounded
                                                           weights
"""

from __future__ import annotations

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.memory import available, refuse_above
from stratoscope.errors import InputError
from stratoscope.models.lm import LM


def in_float32(lm: LM) -> LM:
    """The same model in float32: a copy with the same (rounded) weights; `lm` itself where nothing
    is narrower.

    Raises MemoryRefusal when the copy would not fit, InputError inside `with intervene(...)` and
    the like, which the copy would not take part in.
    """
    weights = [*lm.model.parameters(), *lm.model.buffers()]
    if all(x.dtype.itemsize >= 4 for x in weights if x.is_floating_point()):
        return lm
    if lm.taps.listening:
        raise InputError(
            "the float32 copy is another model: make it before `with intervene`, `trace` or an "
            "edit."
        )
    size = 4 * sum(x.numel() for x in weights)
    refuse_above(
        size,
        available(lm.model.device),
        "this model in float32",
        "load a smaller one, or in another process",
    )
    model = deepcopy(lm.model).float()
    name = f"{lm.provenance['model']} in float32"
    return LM(model, lm.family, tokenizer=lm.tokenizer, processor=lm.processor, name=name)


def spacing(values: Float[Tensor, "*axes"], dtype: torch.dtype) -> Float[Tensor, "*axes"]:
    """The distance between neighbouring numbers of `dtype` where each value lies."""
    size = values.abs().double().clamp_min(torch.finfo(dtype).tiny)
    return (torch.finfo(dtype).eps * 2 ** size.log2().floor()).float()
