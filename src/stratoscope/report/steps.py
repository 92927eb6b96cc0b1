"""The steps of an explanation: their order, what a reader is told while they run, which take long,
and which need another."""

from __future__ import annotations

NAMES = {  # in the order in which they run
    "tokens.next_token": "what it predicts",
    "layers.logit_lens": "the prediction through the layers",
    "tokens.corruption": "a corrupt prompt, and the foil that goes with it",
    "layers.direct_logit_attribution": "which components write it",
    "tokens.occlusion": "which tokens matter: occlusion",
    "tokens.shapley": "which tokens matter: Shapley values",
    "tokens.verbalize": "the evidence in words",
    "layers.activation_patching": "patching layers and tokens, and the null",
    "heads.activation_patching": "patching heads, and the null",
    "heads.attention_pattern": "attention patterns",
    "heads.roles": "roles of heads",
    "neurons.contribution": "which neurons write it",
    "neurons.vocabulary": "what those neurons say",
    "clamp": "switching them off",
    "circuits.discover": "a circuit of edges (minutes)",
}
STEPS = tuple(NAMES)
FAST = (  # what --fast leaves out: four fifths of a report's time
    "tokens.shapley",
    "layers.activation_patching",
    "heads.activation_patching",
    "heads.roles",
    "clamp",
)
NEEDS = {  # what --only brings with a step
    "layers.activation_patching": "tokens.corruption",
    "heads.activation_patching": "tokens.corruption",
    "circuits.discover": "tokens.corruption",
    "tokens.verbalize": "tokens.occlusion",
    "neurons.vocabulary": "neurons.contribution",
    "clamp": "neurons.contribution",
}
