"""CLIP, SigLIP, AIMv2 and MetaCLIP 2: pairs of a text and a vision tower, and each tower alone."""

from __future__ import annotations

from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.families.vit import MLP
from stratoscope.models.family import (
    RESIDUAL_POINTS,
    Family,
    Tower,
    attention_points,
    into,
    out_of,
    under,
)

# CLIP's vision tower has no norm over all positions: post_layernorm is applied to the class token
# only.
CLIP_VISION = Tower(
    layers="encoder.layers",
    embed="embeddings",
    points=RESIDUAL_POINTS
    | attention_points("self_attn", "self_attn.out_proj")
    | {"attn.out": out_of("self_attn")}
    | MLP,
    attn_write=("self_attn.out_proj",),
    mlp_write=("mlp.fc2",),
    causal=False,
    takes="pixel_values",
)
CLIP_TEXT = CLIP_VISION.but(
    embed="embeddings.token_embedding",
    final_norm="final_layer_norm",
    causal=True,
    takes="input_ids",
)
SIGLIP_VISION = CLIP_VISION.but(final_norm="post_layernorm")
SIGLIP_TEXT = CLIP_TEXT.but(causal=False)
AIM_VISION = CLIP_VISION.but(
    final_norm="rms_norm",
    points=attention_points("attention", "attention.out_proj")
    | {
        "attn.out": out_of("attention"),
        "mlp.pre": out_of("ffn.gate_proj"),
        "mlp.act": into("ffn.down_proj"),
        "mlp.out": out_of("ffn"),
    },
    attn_write=("attention.out_proj",),
    mlp_write=("ffn.down_proj",),
)
AIM_TEXT = AIM_VISION.but(embed="embeddings.token_embedding", causal=True, takes="input_ids")
_HANDLED = frozenset({"vision_use_head", "use_head", "is_native", "max_logit_scale"})


def _pair(name: str, text: Tower, vision: Tower) -> Family:
    towers = {
        "": under("text_model", text, "text_config"),
        "vision": under("vision_model", vision, "vision_config"),
    }
    return Family(name, towers, head=(), handles=_HANDLED)


def _text(name: str, tower: Tower) -> Family:
    return Family(name, {"": tower}, head=(), handles=_HANDLED)


def _vision(name: str, tower: Tower) -> Family:
    return Family(name, {"": tower}, head=(), handles=_HANDLED)


def _aimv2(config: Any) -> Family:
    kernel = config.text_config._attn_implementation
    if kernel not in (None, "eager"):
        raise FamilyError(
            "in Transformers, AIMv2's text tower is causal under eager attention and "
            f"bidirectional under {kernel} "
            "unless a batch is padded: which model is meant is uncertain, so it is refused. Load "
            "it with "
            f"attn_implementation='eager', or its vision tower alone."
        )
    return _pair("aimv2", AIM_TEXT, AIM_VISION)


FAMILIES = {
    "clip": _pair("clip", CLIP_TEXT, CLIP_VISION),
    "clip_text_model": _text("clip_text_model", CLIP_TEXT),
    "clip_vision_model": _vision("clip_vision_model", CLIP_VISION),
    "metaclip_2": _pair("metaclip_2", CLIP_TEXT, CLIP_VISION),
    "siglip": _pair("siglip", SIGLIP_TEXT, SIGLIP_VISION),
    "siglip_text_model": _text("siglip_text_model", SIGLIP_TEXT),
    "siglip_vision_model": _vision("siglip_vision_model", SIGLIP_VISION),
    "siglip2": _pair("siglip2", SIGLIP_TEXT, SIGLIP_VISION),
    "siglip2_text_model": _text("siglip2_text_model", SIGLIP_TEXT),
    "siglip2_vision_model": _vision("siglip2_vision_model", SIGLIP_VISION),
    "aimv2": _aimv2,
    "aimv2_text_model": _text("aimv2_text_model", AIM_TEXT),
    "aimv2_vision_model": _vision("aimv2_vision_model", AIM_VISION),
}
