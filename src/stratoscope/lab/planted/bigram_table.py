"""A table of bigrams in one MLP: a Llama of one layer that says, after each of 16 words, what the
table does.

Neuron i is on at word i, and writes the logits of row i: three words that may follow, each as
likely as it was drawn. Every other weight of attention and MLP, eight neurons more included, is
faint noise drawn from `seed`. `planted` says which weights are of the table.

**What it does not show.** A neuron for each word and a weight for each entry: in a trained model a
row of the table is spread over neurons that serve many words.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WORDS, NEURONS, HEAD_DIM, HEADS = 16, 24, 8, 2
CONSTANT = 2 * WORDS  # after a place for each word that stands here, and for each that may follow
HIDDEN = CONSTANT + 8
STRENGTH = 8.0  # of the constants, beside which what is written hardly changes a norm
GATE = 4.0
LOGITS = (4.0, 3.0, 2.0)  # of the words that may follow; 0 of the others
NOISE = 0.02


class BigramTable(NamedTuple):
    """The model; table: what it says after each word where there is no noise; planted: by the
    parameter's name, which weights make it so."""

    model: LlamaForCausalLM
    table: Float[Tensor, "word vocab"]
    planted: dict[str, Bool[Tensor, "..."]]


@torch.no_grad()
def bigram_table(seed: int = 0) -> BigramTable:
    """Both the table and the noise are drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    model = _blank()
    mlp = model.model.layers[0].mlp
    silu = GATE / (1 + math.exp(-GATE))
    every = range(WORDS)
    mlp.gate_proj.weight[every, every] = GATE
    mlp.up_proj.weight[every, CONSTANT] = 1 / STRENGTH
    for word in every:
        follow = WORDS + torch.randperm(WORDS, generator=generator)[: len(LOGITS)]
        mlp.down_proj.weight[follow, word] = torch.tensor(LOGITS) / silu
    inside = {n: w for n, w in model.named_parameters() if ".layers." in n and w.ndim == 2}
    planted = {name: weight != 0 for name, weight in inside.items()}
    table = model(torch.arange(WORDS)[:, None]).logits[:, 0].softmax(dim=-1)
    for name, weight in inside.items():
        noise = NOISE * torch.randn(weight.shape, generator=generator)
        weight += noise.masked_fill(planted[name], 0)
    return BigramTable(model, table, planted)


def _blank() -> LlamaForCausalLM:
    """All zeros but for both ends and the norms, which undo the length of a token's embedding."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # constructors draw weights
        model = LlamaForCausalLM(config).eval()
    length = math.sqrt((1 + 2 * STRENGTH**2) / HIDDEN)
    every = range(WORDS)
    for name, weight in model.named_parameters():
        weight.fill_(length if "norm" in name else 0)
    model.model.embed_tokens.weight[every, every] = 1
    model.model.embed_tokens.weight[:, CONSTANT : CONSTANT + 2] = STRENGTH
    model.lm_head.weight[every, range(WORDS, 2 * WORDS)] = 1
    return model
