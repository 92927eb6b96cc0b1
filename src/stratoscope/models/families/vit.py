"""ViT, CLIP and SigLIP: vision encoders, and the text towers beside them."""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

_MLP = {"mlp.pre": out_of("mlp.fc1"), "mlp.act": into("mlp.fc2"), "mlp.out": out_of("mlp")}

VIT = Tower(
    layers="layers",
    embed="embeddings",
    final_norm="layernorm",
    points=RESIDUAL_POINTS
    | attention_points("attention", "attention.o_proj")
    | {"attn.out": out_of("attention")}
    | _MLP,
    attn_write=("attention.o_proj",),
    mlp_write=("mlp.fc2",),
    causal=False,
)
# CLIP's vision tower has no norm over all positions: post_layernorm is applied to the class token only.
CLIP_VISION = Tower(
    layers="encoder.layers",
    embed="embeddings",
    points=RESIDUAL_POINTS
    | attention_points("self_attn", "self_attn.out_proj")
    | {"attn.out": out_of("self_attn")}
    | _MLP,
    attn_write=("self_attn.out_proj",),
    mlp_write=("mlp.fc2",),
    causal=False,
)
CLIP_TEXT = CLIP_VISION.but(embed="embeddings.token_embedding", final_norm="final_layer_norm", causal=True)
SIGLIP_VISION = CLIP_VISION.but(final_norm="post_layernorm")
SIGLIP_TEXT = CLIP_TEXT.but(causal=False)


def under(prefix: str, tower: Tower, config: str = "") -> Tower:
    """The same tower inside a larger model: every path from the base model gets the prefix."""
    paths = {
        name: f"{prefix}.{getattr(tower, name)}" for name in ("layers", "embed", "final_norm") if getattr(tower, name)
    }
    return tower.but(config=config, **paths)


def _pair(name: str, text: Tower, vision: Tower) -> Family:
    towers = {
        "": under("text_model", text, "text_config"),
        "vision": under("vision_model", vision, "vision_config"),
    }
    return Family(name, towers, head=(), handles=frozenset({"projection_dim", "logit_scale_init_value"}))


FAMILIES = {
    "vit": Family("vit", {"": VIT}, head=("classifier",), pooled=0, vision_only=True),
    "clip": _pair("clip", CLIP_TEXT, CLIP_VISION),
    "clip_text_model": Family("clip_text_model", {"": CLIP_TEXT}, head=()),
    "clip_vision_model": Family("clip_vision_model", {"": CLIP_VISION}, head=(), vision_only=True),
    "siglip": _pair("siglip", SIGLIP_TEXT, SIGLIP_VISION),
    "siglip_text_model": Family("siglip_text_model", {"": SIGLIP_TEXT}, head=()),
    "siglip_vision_model": Family("siglip_vision_model", {"": SIGLIP_VISION}, head=(), vision_only=True),
}
