"""ModernBERT: pre-norm encoder with rotary positions, local and global layers, fused Wqkv and Wi
(gate second)."""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

TOWER = Tower(
    layers="layers",
    embed="embeddings.tok_embeddings",
    final_norm="final_norm",
    points=RESIDUAL_POINTS
    | attention_points("attn", "attn.Wo")
    | {
        "attn.out": out_of("attn"),
        "mlp.pre": out_of("mlp.Wi", part=(0, 2)),  # the half that the activation function takes
        "mlp.act": into("mlp.Wo"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("attn.Wo",),
    mlp_write=("mlp.Wo",),
    causal=False,
)

FAMILIES = {
    "modernbert": Family(
        "modernbert",
        {"": TOWER},
        head=("head", "decoder"),
        handles=frozenset(
            {
                "layer_types",
                "local_attention",
                "sliding_window",
                "global_attn_every_n_layers",
                "global_rope_theta",
                "local_rope_theta",
                "hidden_activation",
                "classifier_activation",
                "norm_bias",
                "decoder_bias",
                "classifier_bias",
                "classifier_pooling",
                "deterministic_flash_attn",
                "sparse_pred_ignore_index",
            }
        ),
    )
}
