"""Linear layers through oneDNN on a CPU, for the length of a block.

torch multiplies float32 matrices on a CPU with MKL, which on AMD processors runs at less than half
of what oneDNN, also built into torch, reaches on the same matrices (`bench/sweeps.py` shows what
that gives). The products are ordinary float32 products summed in another order. The base run and
the user's own runs stay on the model's kernel: only packed rows, which are compared to a tolerance
anyway, come through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_OPERATION = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


class FastLinear(TorchFunctionMode):
    """While open, `torch.nn.functional.linear` on plain float32 CPU tensors is computed by oneDNN;
    all else is as it was."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and _OPERATION is not None and _fits(*args, **kwargs):
            return _OPERATION(*_ordered(*args, **kwargs), "none", [], "")
        return func(*args, **kwargs)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    given = (input, weight) if bias is None else (input, weight, bias)
    return all(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous()
        and x.layout == torch.strided
        for x in given
    ) and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def _ordered(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
