"""Vision-language models: any text stack of a known family, any known vision tower, and the
projector between them.

One rule for all: where the three stand is a row of `_PLACES`; the towers are those of the two
configs' own families.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.families import find
from stratoscope.models.families.bart import EAR, SOUND
from stratoscope.models.families.clip import CLIP_VISION, SIGLIP_VISION
from stratoscope.models.families.gemma import TOWER as GEMMA
from stratoscope.models.families.llama import HANDLED as SLIDING
from stratoscope.models.families.llama import TOWER as LLAMA
from stratoscope.models.family import (
    RESIDUAL_POINTS,
    Family,
    Tower,
    attention_points,
    into,
    out_of,
    under,
)
from stratoscope.models.sites import SEAM_POINTS

# model type -> where the text stack, the vision tower and the projector stand in the base model
_LLAVA = ("language_model", "vision_tower", "multi_modal_projector")
_IDEFICS = ("text_model", "vision_model", "connector")
_QWEN = ("language_model", "visual", "visual.merger")
_PLACES = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "vipllava": _LLAVA,
    "paligemma": _LLAVA,
    "gemma3": _LLAVA,
    "mistral3": _LLAVA,
    "internvl": _LLAVA,
    "aria": _LLAVA,
    "cohere2_vision": _LLAVA,
    "lfm2_vl": _LLAVA,
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "glm4v": _QWEN,
    "blip-2": ("language_model.model", "vision_model", "language_projection"),
}
_HEADS = {"blip-2": ("language_model.lm_head",)}
# Qwen3-VL adds features of the picture, from several depths of the vision tower, after its first
# text layers.
_DEEPSTACK = "after the first layers DeepStack adds features of the picture to the stream"
_HANDLED = frozenset(
    {
        "image_token_index", "image_token_id", "video_token_id", "vision_start_token_id",
        "vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_index",
        "eoi_token_index", "video_token_index", "video_start_token_id", "video_end_token_id",
        "mm_tokens_per_image", "num_image_tokens", "num_query_tokens", "vision_feature_layer",
        "vision_feature_layers", "vision_feature_select_strategy", "projector_hidden_act",
        "projector_hidden_size", "projector_bias", "projector_use_layernorm",
        "projector_layernorm_eps", "projector_layer_norm", "projector_patch_to_query_dict",
        "multimodal_projector_bias", "image_seq_length", "image_grid_pinpoints",
        "use_image_newline_parameter", "vision_aspect_ratio", "scale_factor", "spatial_merge_size",
        "downsample_ratio", "downsample_factor", "alignment_intermediate_size", "perceiver_config",
        "qformer_config", "use_decoder_only_language_model", "image_text_hidden_size",
    }
)  # fmt: skip

_CALLS = (
    "the vision tower attends window by window or picture by picture, in one call for each; "
    "read attn.z"
)
# Qwen's vision blocks call attention once for each window or picture, so one q, k, v or pattern
# does not exist.
QWEN_VISION = Tower(
    layers="blocks",
    points=RESIDUAL_POINTS
    | {
        "attn.z": into("attn.proj"),
        "attn.out": out_of("attn"),
        "mlp.pre": out_of("mlp.gate_proj"),
        "mlp.act": into("mlp.down_proj"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("attn.proj",),
    mlp_write=("mlp.down_proj",),
    causal=False,
    flat=True,
    takes="pixel_values",
    lacks=dict.fromkeys(SEAM_POINTS, _CALLS),
)
QWEN2_VISION = QWEN_VISION.but(
    points={"mlp.pre": out_of("mlp.fc1"), "mlp.act": into("mlp.fc2")}, mlp_write=("mlp.fc2",)
)
QWEN3_VISION = QWEN_VISION.but(
    points={"mlp.pre": out_of("mlp.linear_fc1"), "mlp.act": into("mlp.linear_fc2")},
    mlp_write=("mlp.linear_fc2",),
)
PIXTRAL = CLIP_VISION.but(
    layers="transformer.layers",
    embed="ln_pre",
    points=attention_points("attention", "attention.o_proj")
    | {
        "attn.out": out_of("attention"),
        "mlp.pre": out_of("feed_forward.gate_proj"),
        "mlp.act": into("feed_forward.down_proj"),
        "mlp.out": out_of("feed_forward"),
    },
    attn_write=("attention.o_proj",),
    mlp_write=("feed_forward.down_proj",),
)
BLIP_VISION = SIGLIP_VISION.but(
    points={"attn.z": into("self_attn.projection")},
    attn_write=("self_attn.projection",),
    lacks=dict.fromkeys(
        SEAM_POINTS, "BLIP's vision tower computes attention inside its own module; read attn.z"
    ),
)
GLM = GEMMA.but(
    points={
        "mlp.pre": out_of("mlp.gate_up_proj", part=(0, 2)),
        "attn.out": out_of("post_self_attn_layernorm"),
        "mlp.out": out_of("post_mlp_layernorm"),
    },
    attn_write=("self_attn.o_proj", "post_self_attn_layernorm"),
    mlp_write=("mlp.down_proj", "post_mlp_layernorm"),
)


def _join(config: Any) -> Family | None:
    """The family of the text config and that of the vision config, each at its place; None where no
    family names the text stack: then it is probed.
    """
    text = find(config.text_config)
    if text is None:
        return None
    at = _PLACES[config.model_type][0]
    main, handles, per_token = text.towers[""], text.handles, {}
    # its processor marks the prompt as a prefix, read in both directions
    if config.model_type == "paligemma":
        main, per_token = main.but(causal=False), {"token_type_ids": 0}
        handles |= {"use_bidirectional_attention"}
    alone = replace(
        text,
        name=config.model_type,
        towers={"": under(at, main, "text_config")},
        head=_HEADS.get(config.model_type, text.head),
        handles=handles,
        per_token=per_token,
    )
    return with_vision(config, alone)


def with_vision(config: Any, text: Family) -> Family:
    """The family of a text stack inside a larger model, with the vision tower and the projector
    beside it."""
    if config.model_type not in _PLACES:
        return text
    _, at, projector = _PLACES[config.model_type]
    vision = find(config.vision_config)
    if vision is None:
        raise FamilyError(
            f"`{config.model_type}` with a vision tower `{config.vision_config.model_type}`, which "
            "no family names."
        )
    towers = {**text.towers, "vision": under(at, vision.towers[""], "vision_config")}
    handles = _HANDLED | text.handles | vision.handles
    return replace(text, towers=towers, projector=projector, handles=handles)


def _audio(config: Any) -> Family | None:
    """Qwen2-Audio: the text stack, Whisper's encoder, and the projector that sound comes through.
    It joins two positions of the encoder to one before its last norm, which is so no site."""
    text = find(config.text_config)
    if text is None:
        return None
    towers = {
        "": under("language_model", text.towers[""], "text_config"),
        "audio": under("audio_tower", EAR.but(layers="layers", final_norm=None), "audio_config"),
    }
    handles = text.handles | SOUND | {"audio_token_index", "audio_config"}
    return Family(config.model_type, towers, projector="multi_modal_projector", handles=handles)


def _tower(name: str, tower: Tower, handles: frozenset[str] = frozenset()) -> Family:
    return Family(name, {"": tower}, head=(), handles=handles)


_SIZES = frozenset({"embed_dim", "mlp_ratio", "num_position_embeddings", "attention_heads"})
FAMILIES = dict.fromkeys(_PLACES, _join) | {
    "qwen2_audio": _audio,
    "idefics2_vision": _tower("idefics2_vision", SIGLIP_VISION),
    "idefics3_vision": _tower("idefics3_vision", SIGLIP_VISION),
    "smolvlm_vision": _tower("smolvlm_vision", SIGLIP_VISION),
    "pixtral": _tower("pixtral", PIXTRAL),
    "blip_2_vision_model": _tower("blip_2_vision_model", BLIP_VISION),
    "qwen2_vl_vision": _tower("qwen2_vl_vision", QWEN2_VISION, _SIZES),
    "qwen2_5_vl_vision": _tower("qwen2_5_vl_vision", QWEN_VISION, _SIZES),
    "qwen3_vl_vision": _tower(
        "qwen3_vl_vision", QWEN3_VISION, _SIZES | {"deepstack_visual_indexes"}
    ),
    "glm4v_vision": _tower("glm4v_vision", QWEN_VISION, _SIZES),
    "qwen2_vl_text": Family("qwen2_vl_text", {"": LLAMA}, handles=SLIDING),
    "qwen2_5_vl_text": Family("qwen2_5_vl_text", {"": LLAMA}, handles=SLIDING),
    "qwen3_vl_text": Family("qwen3_vl_text", {"": LLAMA.but(between=_DEEPSTACK)}, handles=SLIDING),
    "glm4v_text": Family("glm4v_text", {"": GLM}, handles=SLIDING),
}
