"""The logit difference and its gradient by token embeddings, by plain Hugging Face and torch."""

from __future__ import annotations

import torch
from torch import Tensor

from stratoscope.models import LM

ANSWER, FOIL = 5, 60


def difference(lm: LM, embeds: Tensor) -> Tensor:
    """The logit difference by plain Hugging Face, from token embeddings (example, position, dim),
    no padding."""
    logits = lm.model(inputs_embeds=embeds).logits[:, -1]
    return logits[:, ANSWER] - logits[:, FOIL]


def slope(lm: LM, embeds: Tensor) -> Tensor:
    """Gradient of the difference with respect to token embeddings, by plain torch."""
    leaf = embeds.detach().requires_grad_(True)
    [gradient] = torch.autograd.grad(difference(lm, leaf).sum(), leaf)
    return gradient


def embeddings(lm: LM, row: list[int]) -> tuple[Tensor, Tensor]:
    """(1, position, dim) of a prompt, and the mean over the vocabulary."""
    table = lm.model.get_input_embeddings()
    return table(torch.tensor([row])).detach(), table.weight.detach().mean(dim=0)
