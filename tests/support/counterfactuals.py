"""An additive model: what stands at a token is a value times one direction, another value times a
second one, and noise across both; the read-out hears the first alone."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from stratoscope.models import LM, wrap
from support import tiny
from support.subjects import parts

YES, NO = 1, 2  # what is said where the value is above 0, and below
FIRST = 4  # of the words that carry values


def additive(direction: Tensor, seed: int = 0) -> tuple[LM, Tensor]:
    """The model, and the value of each of its 96 words; layers write nothing, so that it stands
    along `direction` at every site of the stream."""
    rng = torch.Generator().manual_seed(seed)
    lm = wrap(hf.LlamaForCausalLM(hf.LlamaConfig(**tiny.GROUPED)).eval())
    unit = direction / direction.norm()
    value = torch.rand(96, generator=rng) + 1
    value[::2] *= -1
    noise = torch.randn(96, 32, generator=rng)
    noise -= (noise @ unit)[:, None] * unit
    # nor does it go with the value by chance, of which a search would make use
    noise -= value[:, None] * (value @ noise) / (value @ value)
    with torch.no_grad():
        for part in [part for layer in range(3) for part in parts(lm, layer)]:
            part.weight.zero_()
        lm.model.model.embed_tokens.weight.copy_(value[:, None] * unit + noise)
        lm.model.lm_head.weight.zero_()
        lm.model.lm_head.weight[YES] = 6 * unit
        lm.model.lm_head.weight[NO] = -6 * unit
    return lm, value


def drawn(value: Tensor, n: int, seed: int) -> list[tuple[list[int], list[int], int]]:
    """(base, source, answer): prompts of three to five words, of which the last one's value
    counts."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        sizes = torch.randint(3, 6, (2,), generator=rng).tolist()
        base, source = (torch.randint(FIRST, 96, (k,), generator=rng).tolist() for k in sizes)
        rows.append((base, source, YES if value[source[-1]] > 0 else NO))
    return rows
