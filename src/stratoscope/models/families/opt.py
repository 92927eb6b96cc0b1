"""OPT: learned positions with an offset, MLP modules that stand in the layer itself."""

from __future__ import annotations

from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

TOWER = Tower(
    layers="decoder.layers",
    embed="decoder.embed_tokens",
    final_norm="decoder.final_layer_norm",
    points=RESIDUAL_POINTS
    | attention_points("self_attn", "self_attn.out_proj")
    | {
        "attn.out": out_of("self_attn"),
        "mlp.pre": out_of("fc1"),
        "mlp.act": into("fc2"),
        "mlp.out": out_of("fc2"),
    },
    attn_write=("self_attn.out_proj",),
    mlp_write=("fc2",),
)


def _family(config: Any) -> Family:
    if config.word_embed_proj_dim != config.hidden_size:
        raise FamilyError(
            f"config key `word_embed_proj_dim` = {config.word_embed_proj_dim} differs from "
            "hidden_size "
            f"{config.hidden_size}: family `opt` does not handle the extra projections (OPT-350m "
            "has them)."
        )
    return Family("opt", {"": TOWER}, handles=frozenset({"word_embed_proj_dim", "enable_bias"}))


FAMILIES = {"opt": _family}
