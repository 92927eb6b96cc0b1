"""Encoders with BERT's modules and norms before attention and MLP, so that the stream is a sum."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from stratoscope.models.families.bert import BERT, after_padding, own_attention
from stratoscope.models.family import Family, Tower


def _tower(final_norm: str | None) -> Tower:
    return BERT.but(residual="sequential", norms=None, final_norm=final_norm)


def _esm(config: Any) -> Family:
    """ESM-1b and ESM-2, of residues; embeddings are scaled up by how many residues are masked."""
    handles = frozenset(
        {
            "token_dropout", "emb_layer_norm_before", "position_embedding_type", "vocab_list",
            "is_folding_model", "esmfold_config",
        }
    )  # fmt: skip
    tower = _tower("encoder.emb_layer_norm_after")
    first = 0 if config.position_embedding_type == "rotary" else config.pad_token_id + 1
    return Family("esm", {"": tower}, reserved_positions=first, handles=handles)


def like_bert(model: Any) -> list[Family]:
    """Candidates for a model of BERT's layout under a name that no family knows; [] where it has
    not this layout.

    Which norms stand where, and whether its attention can be seen, is for the proof to say.
    """
    base, layer = model.base_model, None
    with suppress(AttributeError, IndexError):
        layer = base.encoder.layer[0]
    wanted = ("attention.self", "attention.output.dense", "intermediate.dense", "output.dense")
    parts = {} if layer is None else dict(layer.named_modules())
    if not all(name in parts for name in wanted):
        return []
    inside = dict(base.named_modules())
    ends = [name for name in ("encoder.LayerNorm", "encoder.ln", "LayerNorm") if name in inside]
    towers = [BERT] if all(name in parts for name in BERT.norms or ()) else []
    towers += [*map(_tower, ends), _tower(None)]
    why = "its attention does not go through Transformers' attention interface"
    towers += [own_attention(tower, why) for tower in towers]
    towers += [tower.but(causal=True) for tower in towers]
    heads = [name for name in ("cls.predictions", "lm_head") if _has(model, name)]
    name = f"{model.config.model_type} (probed)"
    return [Family(name, {"": tower}, head=tuple(heads[:1])) for tower in towers]


def _has(model: Any, path: str) -> bool:
    return path in dict(model.named_modules())


FAMILIES = {
    "xlm-roberta-xl": after_padding("xlm-roberta-xl", _tower("encoder.LayerNorm")),
    "roberta-prelayernorm": after_padding("roberta-prelayernorm", _tower("LayerNorm")),
    "esm": _esm,
    "megatron-bert": Family(
        "megatron-bert",
        {
            "": own_attention(
                _tower("encoder.ln"), "MegatronBERT computes attention inside its own module"
            )
        },
        head=("cls.predictions",),
        handles=frozenset({"type_vocab_size"}),
    ),
}
