"""One transformer layer that learns to add modulo 59: first by heart, and much later by a rule.

Prompts are `a b =`, each number one token; the answer is (a + b) mod 59. Trained on under half of
all pairs with strong weight decay, it is right on those early and on the others much later: it
groks (Power et al. 2022, arXiv:2201.02177; what it then computes: Nanda et al. 2023,
arXiv:2301.05217). GPT-2 architecture with one layer, four heads and 512 ReLU neurons. `pairs(seed)`
gives both splits, `checkpoints/step-N` the way there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from stratoscope.engine.train import Recipe, generator

VERSION = 1
# to its end, seed 0, one thread: how long it took, and how well it does
TRAINED = (
    "11 CPU minutes: all training pairs right at step 120, 44 % of the others at step 800, all of"
    " them at step 3200"
)
CHECKPOINTS = (
    0,
    0.01,
    0.03,
    0.06,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.8,
    1,
)  # shares of all steps


def pairs(
    seed: int = 0, *, modulus: int = 59, share: float = 0.4
) -> tuple[Int[Tensor, "train_pair place"], Int[Tensor, "test_pair place"]]:
    """Rows (a, b, =, answer) of token ids: the `share` that is trained on, and the rest. A number
    is its own id."""
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).T
    rows = torch.stack([a, b, torch.full_like(a, modulus), (a + b) % modulus], 1)
    rows = rows[torch.randperm(len(rows), generator=generator(seed, 0))]
    return rows[: round(share * len(rows))], rows[round(share * len(rows)) :]


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    modulus: int = 59,
    share: float = 0.4,
    dim: int = 128,
    heads: int = 4,
    neurons: int = 512,
    steps: int = 4000,
    rate: float = 1e-3,
    decay: float = 1.0,
) -> Recipe:
    """Every step sees all training pairs; the learning rate stays as it is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    train, test = pairs(seed, modulus=modulus, share=share)
    tokenizer = _tokenizer(modulus)
    config = GPT2Config(
        vocab_size=modulus + 1,
        n_positions=8,
        n_embd=dim,
        n_layer=1,
        n_head=heads,
        n_inner=neurons,
        activation_function="relu",
        tie_word_embeddings=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    )

    def loss(model: Any, step: int, generator: torch.Generator) -> Tensor:
        return nn.functional.cross_entropy(_last(model, train), train[:, -1])

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def judge(model: Any) -> dict[str, float]:
        numbers = {}
        for name, rows in (("train", train), ("test", test)):
            logits = _last(model, rows)
            numbers[f"{name}_loss"] = nn.functional.cross_entropy(logits, rows[:, -1]).item()
            numbers[f"{name}_accuracy"] = (logits.argmax(-1) == rows[:, -1]).float().mean().item()
        return numbers

    return Recipe(
        GPT2LMHeadModel(config),
        loss,
        save,
        judge,
        steps=steps,
        rate=rate,
        decay=decay,
        warmup=10,
        floor=1.0,
        checkpoints=sorted({round(at * steps) for at in CHECKPOINTS}),
        data={"pairs": {"train": len(train), "test": len(test)}, "chance": 1 / modulus},
        notes=["`grok.pairs(seed)` gives the pairs of both splits."],
    )


def _last(model: Any, rows: Int[Tensor, "pair place"]) -> Tensor:
    """(pair, vocab) logits of the answer."""
    return model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]


def _tokenizer(modulus: int) -> Any:
    """One token for each number, and `=`; a number is its own id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(modulus)} | {"=": modulus}
    whole = Tokenizer(models.WordLevel(words))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="=", model_input_names=["input_ids", "attention_mask"]
    )
