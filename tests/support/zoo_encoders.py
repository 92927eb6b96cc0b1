"""Tiny random encoders and vision encoders beyond those of `tiny`: makers, inputs, and what must be
refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from stratoscope.models import wrap
from support import tiny

S, V = tiny.SMALL, tiny.VISION
# SigLIP 2: no fixed size
PRE = {k: v for k, v in V.items() if k != "image_size"} | {"num_patches": 16}
RATIO = {k: v for k, v in V.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
RESIDUES = {"mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True}
PAIR = {"text_config": S | {"max_position_embeddings": 32}, "vision_config": V}
PAIR2 = {"text_config": PAIR["text_config"] | {"projection_size": 32}, "vision_config": PRE}
NO_HEADS = {k: v for k, v in S.items() if k != "num_attention_heads"}
Maker = Callable[[], tuple[Any, Any]]


def _renamed(config: Any) -> Any:
    """The config under a model type of its own, as remote code has it."""
    config.model_type = "some-encoder"
    return config


TEXT: dict[str, Maker] = {
    "xlm-roberta": lambda: (hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig(**S)),
    "xlm-roberta-xl": lambda: (hf.XLMRobertaXLForMaskedLM, hf.XLMRobertaXLConfig(**S)),
    "camembert": lambda: (hf.CamembertForMaskedLM, hf.CamembertConfig(**S)),
    "electra": lambda: (hf.ElectraForMaskedLM, hf.ElectraConfig(**S, embedding_size=16)),
    "electra discriminator": lambda: (
        hf.ElectraForPreTraining,
        hf.ElectraConfig(**S, embedding_size=32),
    ),
    "mpnet": lambda: (hf.MPNetForMaskedLM, hf.MPNetConfig(**S)),
    "mpnet base": lambda: (hf.MPNetModel, hf.MPNetConfig(**S)),
    "ernie": lambda: (hf.ErnieForMaskedLM, hf.ErnieConfig(**S)),
    "data2vec-text": lambda: (hf.Data2VecTextForMaskedLM, hf.Data2VecTextConfig(**S)),
    "esm": lambda: (hf.EsmForMaskedLM, hf.EsmConfig(**S, **RESIDUES)),
    "esm absolute": lambda: (
        hf.EsmForMaskedLM,
        hf.EsmConfig(**S, mask_token_id=4, emb_layer_norm_before=True),
    ),
    "roberta-prelayernorm": lambda: (
        hf.RobertaPreLayerNormForMaskedLM,
        hf.RobertaPreLayerNormConfig(**S),
    ),
    "megatron-bert": lambda: (hf.MegatronBertForMaskedLM, hf.MegatronBertConfig(**S)),
    "deberta": lambda: (hf.DebertaForMaskedLM, hf.DebertaConfig(**S, **DISENTANGLED)),
    "deberta-v2": lambda: (
        hf.DebertaV2ForMaskedLM,
        hf.DebertaV2Config(
            **S, **DISENTANGLED, position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"
        ),
    ),
    "nomic_bert": lambda: (hf.NomicBertForMaskedLM, hf.NomicBertConfig(**S)),
    "jina_embeddings_v3": lambda: (
        hf.JinaEmbeddingsV3ForMaskedLM,
        hf.JinaEmbeddingsV3Config(**S),
    ),
    "eurobert": lambda: (hf.EuroBertForMaskedLM, hf.EuroBertConfig(**S, mask_token_id=3)),
    "rembert": lambda: (
        hf.RemBertForMaskedLM,
        hf.RemBertConfig(**S, input_embedding_size=16, output_embedding_size=24),
    ),
    "roformer": lambda: (hf.RoFormerForMaskedLM, hf.RoFormerConfig(**S)),
}
TEXT |= {
    # BERT's layout under a name that no family knows
    "bert-generation": lambda: (hf.BertGenerationEncoder, hf.BertGenerationConfig(**S)),
    "post-norm, unknown": lambda: (hf.BertForMaskedLM, _renamed(hf.BertConfig(**S))),
    "pre-norm, unknown": lambda: (hf.XLMRobertaXLForMaskedLM, _renamed(hf.XLMRobertaXLConfig(**S))),
    "own attention, unknown": lambda: (hf.RoFormerModel, _renamed(hf.RoFormerConfig(**S))),
}
VISION: dict[str, Maker] = {
    "deit": lambda: (hf.DeiTForImageClassification, hf.DeiTConfig(**V)),
    "deit distilled": lambda: (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**V)),
    "dinov2": lambda: (hf.Dinov2Model, hf.Dinov2Config(**RATIO)),
    "dinov2 classifier": lambda: (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config(**RATIO, num_labels=3),
    ),
    "dinov2 gated": lambda: (hf.Dinov2Model, hf.Dinov2Config(**RATIO, use_swiglu_ffn=True)),
    "dinov2_with_registers": lambda: (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**RATIO),
    ),
    "dinov3_vit": lambda: (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**V, num_register_tokens=2)),
    "dinov3_vit gated": lambda: (
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig(**V, num_register_tokens=2, use_gated_mlp=True),
    ),
    "beit": lambda: (hf.BeitModel, hf.BeitConfig(**V)),
    "beit relative": lambda: (
        hf.BeitModel,
        hf.BeitConfig(**V, use_relative_position_bias=True, layer_scale_init_value=0.0),
    ),
    "data2vec-vision": lambda: (hf.Data2VecVisionModel, hf.Data2VecVisionConfig(**V)),
    "ijepa": lambda: (hf.IJepaModel, hf.IJepaConfig(**V)),
    "ijepa classifier": lambda: (
        hf.IJepaForImageClassification,
        hf.IJepaConfig(**V, num_labels=3),
    ),
    "beit classifier": lambda: (
        hf.BeitForImageClassification,
        hf.BeitConfig(**V, num_labels=3),
    ),
    "vit_msn": lambda: (hf.ViTMSNForImageClassification, hf.ViTMSNConfig(**V)),
    "clip projected": lambda: (hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig(**V)),
    "siglip alone": lambda: (hf.SiglipVisionModel, hf.SiglipVisionConfig(**V)),
    "siglip2 alone": lambda: (hf.Siglip2VisionModel, hf.Siglip2VisionConfig(**PRE)),
    "aimv2 alone": lambda: (hf.Aimv2VisionModel, hf.Aimv2VisionConfig(**V)),
    "internvl normed": lambda: (
        hf.InternVLVisionModel,
        hf.InternVLVisionConfig(
            **V | {"image_size": [16, 16], "patch_size": [8, 8]},
            use_qk_norm=True,
            norm_type="rms_norm",
            use_mean_pooling=False,
        ),
    ),
    "internvl alone": lambda: (
        hf.InternVLVisionModel,
        hf.InternVLVisionConfig(**V | {"image_size": [16, 16], "patch_size": [8, 8]}),
    ),
}
PAIRS: dict[str, Maker] = {
    "siglip2": lambda: (hf.Siglip2Model, hf.Siglip2Config(**PAIR2)),
    "metaclip_2": lambda: (hf.MetaClip2Model, hf.MetaClip2Config(**PAIR)),
    "aimv2": lambda: (hf.Aimv2Model, hf.Aimv2Config(**PAIR, attn_implementation="eager")),
}
# what is refused, and the part of the reason that must be told
REFUSED: dict[str, tuple[Maker, str]] = {
    "deberta-v2 convolved": (
        lambda: (hf.DebertaV2Model, hf.DebertaV2Config(**S, **DISENTANGLED, conv_kernel_size=3)),
        "a convolution changes the stream between layers 0 and 1",
    ),
    "albert": (
        lambda: (hf.AlbertForMaskedLM, hf.AlbertConfig(**S, embedding_size=16)),
        "all its layers are one module",
    ),
    "longformer": (
        lambda: (hf.LongformerModel, hf.LongformerConfig(**S, attention_window=4)),
        "pads every input to a multiple of its attention window",
    ),
    "squeezebert": (
        lambda: (hf.SqueezeBertModel, hf.SqueezeBertConfig(**S, embedding_size=32)),
        "(example, dim, position)",
    ),
    "xlnet": (
        lambda: (hf.XLNetModel, hf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4)),
        "(position, example, dim)",
    ),
    "fnet": (lambda: (hf.FNetModel, hf.FNetConfig(**NO_HEADS)), "Fourier transform"),
    "vit_mae": (lambda: (hf.ViTMAEModel, hf.ViTMAEConfig(**V)), "at random"),
    "swin": (
        lambda: (
            hf.SwinModel,
            hf.SwinConfig(
                embed_dim=16, image_size=32, depths=[1, 1], num_heads=[2, 2], window_size=2
            ),
        ),
        "change from stage to stage",
    ),
    "hiera": (
        lambda: (
            hf.HieraModel,
            hf.HieraConfig(embed_dim=16, image_size=[32, 32], patch_size=[7, 7]),
        ),
        "change from stage to stage",
    ),
    "aimv2 under sdpa": (
        lambda: (hf.Aimv2Model, hf.Aimv2Config(**PAIR)),
        "causal under eager attention and bidirectional under sdpa",
    ),
}
ALL = TEXT | VISION | PAIRS
UNREAD = ("albert", "deberta-v2 convolved", "fnet", "longformer", "squeezebert", "xlnet")  # text


def build(maker: Maker) -> Any:
    """A random instance in eval mode; weights and biases are spread so that every norm, scale and
    bias matters."""
    kind, config = maker()
    torch.manual_seed(0)
    made = kind(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return made


def inputs(name: str) -> Any:
    """Two prompts of different length, a picture, or a prompt with a picture."""
    if name in TEXT:
        return tiny.inputs("bert")
    generator = torch.Generator().manual_seed(1)
    picture = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if name.startswith("siglip2"):
        flat = torch.randn(1, 16, 192, generator=generator)
        size = torch.tensor([[4, 4]])
        picture = {
            "pixel_values": flat,
            "pixel_attention_mask": torch.ones(1, 16),
            "spatial_shapes": size,
        }
    return (
        picture
        if name in VISION
        else picture | {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 2]])}
    )


def arguments(name: str) -> dict[str, Any]:
    """`inputs(name)` as Hugging Face's forward takes them."""
    if name in TEXT:
        return tiny.arguments("bert")
    given = inputs(name)
    # AIMv2's text is causal only where a mask is given
    return (
        given | {"attention_mask": torch.ones_like(given["input_ids"])} if name in PAIRS else given
    )


@cache
def lm(name: str) -> Any:
    """A wrapped instance: one for all tests, which leave it as it was."""
    return wrap(build(ALL[name]))
