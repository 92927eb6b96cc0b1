"""Vision-language models: a text stack of a known family, a vision tower, and a projector between them."""

from __future__ import annotations

from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.families.clip import CLIP_VISION, SIGLIP_VISION
from stratoscope.models.families.llama import FAMILIES as LLAMA
from stratoscope.models.families.llama import TOWER
from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, into, out_of, under
from stratoscope.models.sites import SEAM_POINTS

_VISION = {"clip_vision_model": CLIP_VISION, "siglip_vision_model": SIGLIP_VISION}
_HANDLED = frozenset(
    {
        "image_token_index", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "image_seq_length",
        "multimodal_projector_bias", "scale_factor", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    }
)  # fmt: skip
# Qwen's vision blocks call attention once for each window of patches, so one q, k, v or pattern does not exist.
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
    lacks=dict.fromkeys(SEAM_POINTS, "the vision tower attends window by window, in one call for each; read attn.z"),
)


def _join(name: str, text: str, vision: str, projector: str, tower: Tower) -> Family:
    towers = {"": under(text, TOWER, "text_config"), "vision": under(vision, tower, "vision_config")}
    return Family(name, towers, projector=projector, handles=_HANDLED)


def _llava(config: Any) -> Family:
    text, vision = config.text_config.model_type, config.vision_config.model_type
    if text not in LLAMA or vision not in _VISION:
        raise FamilyError(
            f"LLaVA with text `{text}` and vision `{vision}`: family `llava` joins one of {sorted(LLAMA)} with one of "
            f"{sorted(_VISION)}."
        )
    return _join("llava", "language_model", "vision_tower", "multi_modal_projector", _VISION[vision])


def _idefics(config: Any) -> Family:
    if config.text_config.model_type not in LLAMA:
        raise FamilyError(
            f"{config.model_type} with text `{config.text_config.model_type}`: only {sorted(LLAMA)} are handled."
        )
    return _join(config.model_type, "text_model", "vision_model", "connector", SIGLIP_VISION)


FAMILIES = {
    "llava": _llava,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "qwen2_5_vl": _join("qwen2_5_vl", "language_model", "visual", "visual.merger", QWEN_VISION),
}
