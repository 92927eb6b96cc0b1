"""BERT, RoBERTa and DistilBERT: encoders whose norms stand after each addition (post-norm)."""

from __future__ import annotations

from stratoscope.models.family import Family, Tower, attention_points, into, out_of

BERT = Tower(
    layers="encoder.layer",
    embed="embeddings.word_embeddings",
    points=attention_points("attention.self", "attention.output.dense")
    | {
        "resid_pre": into(""),
        "resid_mid": out_of("attention.output"),
        "resid_post": out_of(""),
        "attn.out": out_of("attention.output.dense"),
        "mlp.pre": out_of("intermediate.dense"),
        "mlp.act": into("output.dense"),
        "mlp.out": out_of("output.dense"),
    },
    attn_write=("attention.output.dense",),
    mlp_write=("output.dense",),
    residual="post-norm",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    causal=False,
)
DISTILBERT = Tower(
    layers="transformer.layer",
    embed="embeddings.word_embeddings",
    points=attention_points("attention", "attention.out_lin")
    | {
        "resid_pre": into(""),
        "resid_mid": out_of("sa_layer_norm"),
        "resid_post": out_of(""),
        "attn.out": out_of("attention"),
        "mlp.pre": out_of("ffn.lin1"),
        "mlp.act": into("ffn.lin2"),
        "mlp.out": out_of("ffn"),
    },
    attn_write=("attention.out_lin",),
    mlp_write=("ffn.lin2",),
    residual="post-norm",
    norms=("sa_layer_norm", "output_layer_norm"),
    causal=False,
)
_DISTIL_HEAD = ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")

FAMILIES = {
    "bert": Family("bert", {"": BERT}, head=("cls.predictions",), handles=frozenset({"type_vocab_size"})),
    "roberta": Family("roberta", {"": BERT}, reserved_positions=2, handles=frozenset({"type_vocab_size"})),
    "distilbert": Family(
        "distilbert", {"": DISTILBERT}, head=_DISTIL_HEAD, handles=frozenset({"sinusoidal_pos_embds"})
    ),
}
