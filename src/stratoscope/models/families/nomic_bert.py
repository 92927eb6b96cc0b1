"""Nomic BERT and Jina embeddings 3: post-norm encoders with a decoder's module names and rotary
positions."""

from __future__ import annotations

from stratoscope.models.family import Family, Tower, attention_points, into, out_of

JINA = Tower(
    layers="layers",
    embed="embeddings.word_embeddings",
    points=attention_points("self_attn", "self_attn.o_proj")
    | {
        "resid_pre": into(""),
        "resid_mid": out_of("post_attention_layernorm"),
        "resid_post": out_of(""),
        "attn.out": out_of("self_attn"),
        "mlp.pre": out_of("mlp.fc1"),
        "mlp.act": into("mlp.fc2"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("self_attn.o_proj",),
    mlp_write=("mlp.fc2",),
    residual="post-norm",
    norms=("post_attention_layernorm", "post_mlp_layernorm"),
    causal=False,
)
NOMIC = JINA.but(
    points={"mlp.pre": out_of("mlp.gate_proj"), "mlp.act": into("mlp.down_proj")},
    mlp_write=("mlp.down_proj",),
)

FAMILIES = {
    "nomic_bert": Family(
        "nomic_bert",
        {"": NOMIC},
        head=("cls.predictions",),
        handles=frozenset({"type_vocab_size"}),
    ),
    "jina_embeddings_v3": Family(
        "jina_embeddings_v3", {"": JINA}, handles=frozenset({"type_vocab_size"})
    ),
}
