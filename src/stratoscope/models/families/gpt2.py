"""GPT-2: learned positions, LayerNorm, fused c_attn, weights stored transposed (Conv1D)."""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of
from stratoscope.models.sites import SEAM_POINTS

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

# the first GPT: normed after each addition, and no norm at the end
FIRST = TOWER.but(
    embed="tokens_embed",
    final_norm=None,
    residual="post-norm",
    norms=("ln_1", "ln_2"),
    points={"resid_mid": out_of("ln_1")},
    lacks=dict.fromkeys(SEAM_POINTS, "it computes attention inside its own module; read attn.z"),
)

FAMILIES = {
    "openai-gpt": Family(
        "openai-gpt", {"": FIRST}, handles=frozenset({"afn", "predict_special_tokens"})
    ),
    "gpt2": Family(
        "gpt2",
        {"": TOWER},
        handles=frozenset(
            {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_inner", "n_ctx"}
        ),
    ),
}
