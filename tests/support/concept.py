"""A tiny Llama with one planted concept: words that have it, words that lack it, and an answer that
follows it."""

from __future__ import annotations

import random
from functools import cache

import torch
from torch import Tensor

from stratoscope.models import LM, wrap
from support import tiny

WITH, WITHOUT = range(20, 40), range(40, 60)
MORE, FOIL = 70, 71  # what is said with the concept, and without
PLAIN = range(3, 12)  # words that say nothing of it


def axis() -> Tensor:
    """(dim,) the concept's direction, of length 1."""
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(4))
    return drawn / drawn.norm()


def other() -> Tensor:
    """(dim,) a direction at right angles, along which words differ from each other."""
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(5))
    drawn -= (drawn @ axis()) * axis()
    return drawn / drawn.norm()


@cache
@torch.no_grad()
def concept(topic: float = 0.0) -> LM:
    """Words with the concept are +2 along its axis, those without -2, beside noise; layer 0's heads
    look at all tokens alike and bring what they have of it. topic: how far each second word of both
    kinds lies one way along another direction, and the others the other way."""
    lm = wrap(tiny.model("llama"))
    model, generator = lm.model, torch.Generator().manual_seed(0)
    words = model.model.embed_tokens.weight
    words.copy_(0.2 * torch.randn(words.shape, generator=generator))
    for word in (*WITH, *WITHOUT):
        words[word] += 2 * axis() * (1 if word in WITH else -1)
        words[word] += topic * other() * (1 if word % 2 else -1)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        layer.mlp.down_proj.weight.mul_(0.05)
        attention.o_proj.weight.zero_()
        if number == 0:
            attention.q_proj.weight.zero_()
            attention.v_proj.weight.zero_()
            attention.v_proj.weight[0] = axis()
            attention.o_proj.weight[:, 0] = axis()
    model.lm_head.weight.mul_(0.1)
    model.lm_head.weight[MORE], model.lm_head.weight[FOIL] = 2 * axis(), -2 * axis()
    return lm


def pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """So many pairs of ids that differ in their last word: with the concept, and without."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        begin = draw.choices(PLAIN, k=2)
        made.append(([*begin, draw.choice(WITH)], [*begin, draw.choice(WITHOUT)]))
    return made
