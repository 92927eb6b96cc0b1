"""What a model costs: floating-point operations by torch's own counter, and parameters.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and
attention, as torch counts them; norms, activations and softmax are not. Attention counts as if
every query met every key, whatever the mask leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Size:
    """parameters: all, those that are tied once. embeddings: of these, in tables that are looked up
    (a read-out that is tied to one counts there). trained: those that take a gradient."""

    parameters: int
    embeddings: int
    trained: int

    @property
    def body(self) -> int:
        """Parameters outside embeddings."""
        return self.parameters - self.embeddings


def size(model: nn.Module) -> Size:
    """How many parameters a model has."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    own = list(model.parameters())
    return Size(
        sum(p.numel() for p in own),
        sum(p.numel() for p in own if id(p) in tables),
        sum(p.numel() for p in own if p.requires_grad),
    )


def flops(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> int:
    """Operations of one forward pass of `model(**batch)`; with `loss(model, batch)`, of that loss
    and its gradients.

    Attention is taken apart into its two products, whose count does not depend on the kernel. The
    model, its gradients, modes and torch's random state are left as they were.
    """
    modes = [(part, part.training) for part in model.modules()]
    learned = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with (
            torch.random.fork_rng(devices=devices),
            sdpa_kernel(SDPBackend.MATH),
            torch.set_grad_enabled(loss is not None),
            counter,
        ):
            if loss is None:
                model(**batch)
            else:
                torch.autograd.grad(loss(model, batch), learned, allow_unused=True)
    finally:
        for part, mode in modes:
            part.training = mode
    return int(counter.get_total_flops())
