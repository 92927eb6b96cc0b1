"""Gemma: post-norms before the residual is added, scaled embedding, soft-capped scores (2) and
logits (2).

attn.out and mlp.out are read after the post-norm, so that they are what is added to the residual
stream.
"""

from __future__ import annotations

from typing import Any

from stratoscope.models.families.llama import TOWER as LLAMA
from stratoscope.models.family import Family, out_of

TOWER = LLAMA.but(
    points={
        "attn.out": out_of("post_attention_layernorm"),
        "mlp.out": out_of("post_feedforward_layernorm"),
    },
    attn_write=("self_attn.o_proj", "post_attention_layernorm"),
    mlp_write=("mlp.down_proj", "post_feedforward_layernorm"),
)
_HANDLED = frozenset(
    {
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
        "layer_types",
        "_sliding_window_pattern",
        "hidden_activation",
        "rope_local_base_freq",
    }
)


def _gemma3(config: Any) -> Family:
    # Gemma 2 has this key too, but there Transformers' kernels disagree on what it means, so it is
    # refused
    tower = TOWER.but(causal=not config.use_bidirectional_attention)
    return Family("gemma3_text", {"": tower}, handles=_HANDLED | {"use_bidirectional_attention"})


FAMILIES = {
    "gemma": Family("gemma", {"": LLAMA}, handles=_HANDLED),
    "gemma2": Family("gemma2", {"": TOWER}, handles=_HANDLED),
    "gemma3_text": _gemma3,
}
