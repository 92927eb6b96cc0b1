"""The default family: pre-norm decoder, gated MLP, separate projections (Llama, SmolLM, Mistral,
Qwen 2 and 3)."""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

TOWER = Tower(
    layers="layers",
    embed="embed_tokens",
    final_norm="norm",
    points=RESIDUAL_POINTS
    | attention_points("self_attn", "self_attn.o_proj")
    | {
        "attn.out": out_of("self_attn"),
        "mlp.pre": out_of("mlp.gate_proj"),
        "mlp.act": into("mlp.down_proj"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("self_attn.o_proj",),
    mlp_write=("mlp.down_proj",),
)

# which layers see only a window: inside Transformers' masks, and so in the pattern
HANDLED = frozenset({"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"})

FAMILIES = {
    name: Family(name, {"": TOWER}, handles=HANDLED)
    for name in ("llama", "mistral", "qwen2", "qwen3")
}
