"""Operations against a tiny transformer's closed form, and parameters against its shapes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from stratoscope.engine import budget

ROWS, LENGTH, DIM, WIDE, VOCAB, LAYERS, HEADS, KV = 3, 7, 32, 48, 60, 2, 4, 2


def llama(kernel: str = "sdpa", *, tied: bool = False) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        tie_word_embeddings=tied,
        attn_implementation=kernel,
    )
    return hf.LlamaForCausalLM(config).eval()


def by_hand() -> tuple[int, int]:
    """Two operations for each multiplied pair: (products with weights, products of attention)."""
    narrow = DIM * KV // HEADS
    weights = LAYERS * (2 * DIM * DIM + 2 * DIM * narrow + 3 * DIM * WIDE) + DIM * VOCAB
    attention = LAYERS * 2 * LENGTH * LENGTH * DIM  # scores, and what is read
    return 2 * ROWS * LENGTH * weights, 2 * ROWS * attention


BATCH = {"input_ids": torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_llama_by_hand(kernel: str) -> None:
    assert budget.flops(llama(kernel), BATCH) == sum(by_hand())


def test_gradients_are_twice_the_forward_pass() -> None:
    """Each product has two gradients; where only the read-out learns, there is only its own."""

    def loss(model: hf.LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).logits.square().mean()

    model = llama()
    assert budget.flops(model, BATCH, loss=loss) == 3 * sum(by_hand())
    for name, value in model.named_parameters():
        value.requires_grad_("lm_head" in name)
    only_head = 2 * ROWS * LENGTH * DIM * VOCAB
    expected = sum(by_hand()) + only_head
    assert budget.flops(model, BATCH, loss=loss) == expected


def test_nothing_is_changed() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    budget.flops(model, BATCH, loss=lambda model, batch: model(**batch).logits.mean())
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters(tied: bool) -> None:
    narrow = DIM * KV // HEADS
    layer = 2 * DIM * DIM + 2 * DIM * narrow + 3 * DIM * WIDE + 2 * DIM
    head = 0 if tied else VOCAB * DIM
    model = llama(tied=tied)
    model.model.norm.weight.requires_grad_(False)
    found = budget.size(model)
    assert found.embeddings == VOCAB * DIM
    assert found.body == LAYERS * layer + DIM + head
    assert found.trained == found.parameters - DIM
