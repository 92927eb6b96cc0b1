"""Tiny random vision-language models, with a prompt that holds a picture, as their processors would
make it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from stratoscope.models import wrap
from support import tiny
from support import zoo_encoders as zoo

IMAGE = tiny.IMAGE
G, V = tiny.GROUPED, tiny.VISION
GEMMA = G | {"head_dim": 8}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
GLM_IDS = {"image_token_id": IMAGE, "image_start_token_id": 92, "image_end_token_id": 93}
MIXED = {
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
RESAMPLER = {
    "hidden_size": 32,
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
}
RESAMPLER |= {"num_key_value_heads": 2, "resampler_head_dim": 8}
SOUND = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
SOUND |= {"num_mel_bins": 8, "max_source_positions": 16}
SQUARE = {"image_size": [16, 16], "patch_size": [4, 4]}


def _llama() -> Any:
    return hf.LlamaConfig(**G)


def _deep() -> Any:
    vision = QWEN | {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    return hf.Qwen3VLConfig(text_config=GEMMA | ROPE, vision_config=vision, **QWEN_IDS)


def _glm() -> Any:
    rope = {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
    vision = QWEN | {"intermediate_size": 48, "out_hidden_size": 32, "image_size": 32}
    return hf.Glm4vConfig(text_config=G | rope, vision_config=vision, video_token_id=91, **GLM_IDS)


def _gemma3() -> Any:
    text = GEMMA | MIXED | {"query_pre_attn_scalar": 8}
    ids = {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93}
    return hf.Gemma3Config(text_config=text, vision_config=V, mm_tokens_per_image=4, **ids)


def _blip() -> Any:
    text = hf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=96,
        word_embed_proj_dim=32,
    )
    middle = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    middle |= {"encoder_hidden_size": 32, "vocab_size": 96}
    return hf.Blip2Config(
        text_config=text.to_dict(),
        vision_config=V,
        qformer_config=middle,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def _pali(text: Any) -> Any:
    vision = hf.SiglipVisionConfig(**V)
    return hf.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32
    )


def _llava(kind: Any, text: Any, vision: Any, **more: Any) -> Any:
    return kind(text_config=text, vision_config=vision, image_token_index=IMAGE, **more)


ALL: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": lambda: (
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLConfig(
            text_config=G | ROPE, vision_config=QWEN | {"embed_dim": 32, "mlp_ratio": 2}, **QWEN_IDS
        ),
    ),
    "qwen3_vl": lambda: (hf.Qwen3VLForConditionalGeneration, _deep()),
    "glm4v": lambda: (hf.Glm4vForConditionalGeneration, _glm()),
    "gemma3": lambda: (hf.Gemma3ForConditionalGeneration, _gemma3()),
    "paligemma": lambda: (hf.PaliGemmaForConditionalGeneration, _pali(hf.GemmaConfig(**GEMMA))),
    "paligemma 2": lambda: (
        hf.PaliGemmaForConditionalGeneration,
        _pali(hf.Gemma2Config(**GEMMA, query_pre_attn_scalar=8)),
    ),
    "internvl": lambda: (
        hf.InternVLForConditionalGeneration,
        hf.InternVLConfig(
            text_config=hf.Qwen2Config(**G),
            vision_config=hf.InternVLVisionConfig(**V | SQUARE),
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
    ),
    "llava_next": lambda: (
        hf.LlavaNextForConditionalGeneration,
        _llava(
            hf.LlavaNextConfig, _llama(), hf.CLIPVisionConfig(**V), image_grid_pinpoints=[[16, 32]]
        ),
    ),
    "llava_onevision": lambda: (
        hf.LlavaOnevisionForConditionalGeneration,
        _llava(
            hf.LlavaOnevisionConfig,
            hf.Qwen2Config(**G),
            hf.SiglipVisionConfig(**V),
            video_token_index=91,
            image_grid_pinpoints=[[16, 32]],
        ),
    ),
    "vipllava": lambda: (
        hf.VipLlavaForConditionalGeneration,
        _llava(hf.VipLlavaConfig, _llama(), hf.CLIPVisionConfig(**V), vision_feature_layers=[-1]),
    ),
    "mistral3": lambda: (
        hf.Mistral3ForConditionalGeneration,
        _llava(
            hf.Mistral3Config,
            hf.MistralConfig(**G),
            hf.PixtralVisionConfig(**V | {"patch_size": 4}),
            spatial_merge_size=2,
        ),
    ),
    "pixtral": lambda: (
        hf.LlavaForConditionalGeneration,
        _llava(
            hf.LlavaConfig,
            hf.MistralConfig(**G),
            hf.PixtralVisionConfig(**V),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "idefics2": lambda: (
        hf.Idefics2ForConditionalGeneration,
        hf.Idefics2Config(
            text_config=hf.MistralConfig(**G),
            vision_config=V,
            perceiver_config=RESAMPLER,
            image_token_id=IMAGE,
        ),
    ),
    "aria": lambda: (
        hf.AriaForConditionalGeneration,
        hf.AriaConfig(
            text_config=G | {"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
            vision_config=V | {"model_type": "idefics3_vision"},
            image_token_index=IMAGE,
            projector_patch_to_query_dict={4: 4},
        ),
    ),
    "lfm2_vl": lambda: (
        hf.Lfm2VlForConditionalGeneration,
        hf.Lfm2VlConfig(
            text_config=hf.Lfm2Config(
                **G, layer_types=["full_attention", "conv", "full_attention"]
            ),
            vision_config=hf.Siglip2VisionConfig(**zoo.PRE),
            projector_hidden_size=32,
            image_token_id=IMAGE,
        ),
    ),
    "cohere2_vision": lambda: (
        hf.Cohere2VisionForConditionalGeneration,
        hf.Cohere2VisionConfig(
            text_config=hf.Cohere2Config(**G, logit_scale=1.0),
            vision_config=hf.SiglipVisionConfig(**V),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=32,
        ),
    ),
    "blip-2": lambda: (hf.Blip2ForConditionalGeneration, _blip()),
    "qwen2_audio": lambda: (
        hf.Qwen2AudioForConditionalGeneration,
        hf.Qwen2AudioConfig(
            text_config=hf.Qwen2Config(**G), audio_config=SOUND, audio_token_index=IMAGE
        ),
    ),
}
PICTURES = [name for name in ALL if name != "qwen2_audio"]
WORDS = [name for name in ALL if name != "blip-2"]  # which answers no prompt without a picture
TOKENS = {
    "cohere2_vision": 1,
    "llava_next": 14,
    "llava_onevision": 14,
    "qwen2_vl": 16,
    "qwen3_vl": 16,
    "glm4v": 16,
}
PROMPTS = tiny.inputs("llama")


def inputs(name: str) -> dict[str, torch.Tensor]:
    """One prompt with one picture."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1, *[IMAGE] * TOKENS.get(name, 4), 3, 4, 5, 6, 7, 8]])
    at = ids == IMAGE
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if TOKENS.get(name) == 16:
        patches = torch.randn(64, 96, generator=generator)
        grid = torch.tensor([[1, 8, 8]])
        return given | {
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": at.long(),
        }
    if TOKENS.get(name) == 14:  # three pieces of one picture
        pieces = torch.randn(1, 3, 3, 16, 16, generator=generator)
        return given | {"pixel_values": pieces, "image_sizes": torch.tensor([[16, 32]])}
    if name == "lfm2_vl":
        size = torch.tensor([[4, 4]])
        pieces = torch.randn(1, 16, 192, generator=generator)
        return given | {
            "pixel_values": pieces,
            "pixel_attention_mask": torch.ones(1, 16).long(),
            "spatial_shapes": size,
        }
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if name == "gemma3":
        given["token_type_ids"] = at.long()
    elif name.startswith("paligemma"):
        given["token_type_ids"] = torch.zeros_like(ids)
    elif name == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    return given | {"pixel_values": pixels[:, None] if name == "idefics2" else pixels}


@cache
def lm(name: str) -> Any:
    return wrap(zoo.build(ALL[name]))
