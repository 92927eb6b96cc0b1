"""Encoders with BERT's modules and norms before attention and MLP, so that the stream is a sum."""

from __future__ import annotations

from typing import Any

from stratoscope.models.families.bert import BERT, after_padding, own_attention
from stratoscope.models.family import Family


def _tower(final_norm: str) -> Any:
    return BERT.but(residual="sequential", norms=None, final_norm=final_norm)


def _esm(config: Any) -> Family:
    """ESM-1b and ESM-2, of residues; embeddings are scaled up by how many residues are masked."""
    handles = frozenset(
        {
            "token_dropout", "emb_layer_norm_before", "position_embedding_type", "vocab_list", "is_folding_model",
            "esmfold_config",
        }
    )  # fmt: skip
    tower = _tower("encoder.emb_layer_norm_after")
    first = 0 if config.position_embedding_type == "rotary" else config.pad_token_id + 1
    return Family("esm", {"": tower}, reserved_positions=first, handles=handles)


FAMILIES = {
    "xlm-roberta-xl": after_padding("xlm-roberta-xl", _tower("encoder.LayerNorm")),
    "roberta-prelayernorm": after_padding("roberta-prelayernorm", _tower("LayerNorm")),
    "esm": _esm,
    "megatron-bert": Family(
        "megatron-bert",
        {"": own_attention(_tower("encoder.ln"), "MegatronBERT computes attention inside its own module")},
        head=("cls.predictions",),
        handles=frozenset({"type_vocab_size"}),
    ),
}
