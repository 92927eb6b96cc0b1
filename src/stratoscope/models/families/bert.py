"""Encoders with BERT's layout, whatever their model type: norms stand after each addition.

Those that compute attention in their own module (MPNet, RemBERT, RoFormer) lack what lives inside
the attention function. `embed` is the table of words, in its own width where the model projects it
(ELECTRA, RemBERT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import Family, Tower, attention_points, into, out_of
from stratoscope.models.sites import SEAM_POINTS

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


def own_attention(tower: Tower, why: str) -> Tower:
    """The tower without the points that exist only in Transformers' attention interface."""
    return tower.but(lacks=dict.fromkeys(SEAM_POINTS, f"{why}; read attn.z"))


_OWN = "computes attention inside its own module and never calls the attention interface"
MPNET = own_attention(
    BERT.but(
        points={
            "resid_mid": out_of("attention"),
            "attn.z": into("attention.attn.o"),
            "attn.out": out_of("attention.attn.o"),
        },
        attn_write=("attention.attn.o",),
        norms=("attention.LayerNorm", "output.LayerNorm"),
    ),
    "MPNet adds a bias for relative positions inside its own attention module",
)
_DISTIL_HEAD = ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")
_TYPES = frozenset({"type_vocab_size"})


def after_padding(
    name: str, tower: Tower, handles: frozenset[str] = _TYPES
) -> Callable[[Any], Family]:
    """RoBERTa and its kin: the first position has the number of the padding id plus one."""

    def family(config: Any) -> Family:
        pad = getattr(config, "pad_token_id", None)
        first = 2 if pad is None else pad + 1
        return Family(name, {"": tower}, reserved_positions=first, handles=handles)

    return family


def _electra(config: Any) -> Family:
    head = ("generator_predictions", "generator_lm_head")
    return Family("electra", {"": BERT}, head=head, handles=_TYPES | {"summary_last_dropout"})


def _rembert(config: Any) -> Family:
    handles = _TYPES | {"input_embedding_size", "output_embedding_size", "classifier_dropout_prob"}
    tower = own_attention(BERT, f"RemBERT {_OWN}")
    return Family("rembert", {"": tower}, head=("cls.predictions",), handles=handles)


def _deberta(config: Any) -> Family:
    """DeBERTa 1, 2 and 3: BERT's layout round an attention that reads content and position
    apart."""
    if getattr(config, "conv_kernel_size", 0):
        raise FamilyError(
            f"this {config.model_type} sets `conv_kernel_size` = {config.conv_kernel_size}: a "
            "convolution changes the "
            "stream between layers 0 and 1, so that resid_post of one is not resid_pre of the "
            "next; refused."
        )
    why = "DeBERTa scores content and relative position apart, inside its own attention module"
    handles = _TYPES | {
        "relative_attention", "max_relative_positions", "position_buckets", "pos_att_type",
        "share_att_key", "position_biased_input", "norm_rel_ebd", "legacy", "pooler_dropout",
        "pooler_hidden_act", "pooler_hidden_size", "conv_act", "conv_groups",
    }  # fmt: skip
    tower = own_attention(BERT, why)
    return Family(config.model_type, {"": tower}, head=("cls.predictions",), handles=handles)


FAMILIES = {
    "bert": Family("bert", {"": BERT}, head=("cls.predictions",), handles=_TYPES),
    "ernie": Family(
        "ernie",
        {"": BERT},
        head=("cls.predictions",),
        handles=_TYPES | {"task_type_vocab_size", "use_task_id"},
    ),
    "roberta": after_padding("roberta", BERT),
    "xlm-roberta": after_padding("xlm-roberta", BERT),
    "camembert": after_padding("camembert", BERT),
    "data2vec-text": after_padding("data2vec-text", BERT),
    "mpnet": after_padding("mpnet", MPNET, frozenset({"relative_attention_num_buckets"})),
    "electra": _electra,
    "rembert": _rembert,
    "roformer": Family(
        "roformer",
        {"": own_attention(BERT, f"RoFormer {_OWN}")},
        head=("cls.predictions",),
        handles=_TYPES | {"rotary_value"},
    ),
    "deberta": _deberta,
    "deberta-v2": _deberta,
    "distilbert": Family(
        "distilbert",
        {"": DISTILBERT},
        head=_DISTIL_HEAD,
        handles=frozenset({"sinusoidal_pos_embds"}),
    ),
}
