"""Hand-built transformers whose mechanism is known exactly, to judge interpretability methods by.

Each is an ordinary Hugging Face `LlamaForCausalLM` or `GPT2LMHeadModel` (2 to 4 layers, 4 heads and
32 neurons each) with a tokenizer of two dozen words. `canvas` says what the residual stream holds;
one file for each mechanism sets its heads and neurons; `Planted` says what is true of it, and draws
more prompts. Everything else in the model is faint noise drawn from `seed`.

    planted = induction()
    planted.model(**planted.tokenizer(planted.clean, return_tensors="pt")).logits

**What it does not show.** A method that finds these has passed the easiest case: one-hot features,
one path (in one model with an opponent, in one with a backup), no superposition. Planted attention
is nearly saturated (above 0.99), so gradients through a pattern are small.
"""

from __future__ import annotations

from stratoscope.lab.planted.copying import copy_head
from stratoscope.lab.planted.facts import fact_lookup, fact_lookup_moved
from stratoscope.lab.planted.hops import two_hop
from stratoscope.lab.planted.indirect_object import indirect_object
from stratoscope.lab.planted.induction_circuit import induction, induction_gpt2
from stratoscope.lab.planted.previous_token import previous_token_head
from stratoscope.lab.planted.suppression import suppression
from stratoscope.lab.planted.truth import Planted, Variant

__all__ = [
    "Planted",
    "Variant",
    "copy_head",
    "everything",
    "fact_lookup",
    "fact_lookup_moved",
    "indirect_object",
    "induction",
    "induction_gpt2",
    "previous_token_head",
    "suppression",
    "two_hop",
]


def everything(seed: int = 0) -> tuple[Planted, ...]:
    """All planted models, simplest first; about a tenth of a second."""
    return (
        previous_token_head(seed),
        copy_head(seed),
        induction(seed),
        induction_gpt2(seed),
        fact_lookup(seed),
        fact_lookup_moved(seed),
        two_hop(seed),
        suppression(seed),
        indirect_object(seed),
    )
