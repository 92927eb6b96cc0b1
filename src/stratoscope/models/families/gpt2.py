"""GPT-2: learned positions, LayerNorm, fused c_attn, weights stored transposed (Conv1D)."""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

TOWER = Tower(
    layers="h",
    embed="wte",
    final_norm="ln_f",
    points=RESIDUAL_POINTS
    | attention_points("attn", "attn.c_proj")
    | {
        "attn.out": out_of("attn"),
        "mlp.pre": out_of("mlp.c_fc"),
        "mlp.act": into("mlp.c_proj"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("attn.c_proj",),
    mlp_write=("mlp.c_proj",),
)

FAMILIES = {
    "gpt2": Family(
        "gpt2",
        {"": TOWER},
        handles=frozenset({"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_inner", "n_ctx"}),
    )
}
