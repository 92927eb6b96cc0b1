"""Vision encoders of ViT's layout: ViT, DeiT, I-JEPA, ViT-MSN, BEiT, Data2Vec and InternVL's tower;
DINOv2 and DINOv3.

Layer scales stand between a projection and the stream, as a module or as a bare parameter:
`attn.out` and `mlp.out` are what is added, after them.
"""

from __future__ import annotations

from typing import Any

from stratoscope.models.family import (
    RESIDUAL_POINTS,
    Family,
    Tower,
    attention_points,
    into,
    out_of,
)
from stratoscope.models.sites import SEAM_POINTS

MLP = {"mlp.pre": out_of("mlp.fc1"), "mlp.act": into("mlp.fc2"), "mlp.out": out_of("mlp")}

VIT = Tower(
    layers="layers",
    embed="embeddings",
    final_norm="layernorm",
    points=RESIDUAL_POINTS
    | attention_points("attention", "attention.o_proj")
    | {"attn.out": out_of("attention")}
    | MLP,
    attn_write=("attention.o_proj",),
    mlp_write=("mlp.fc2",),
    causal=False,
    takes="pixel_values",
)
# the scales are bare parameters of the layer
SCALED = VIT.but(
    points={
        "attn.out": out_of("attention", scale="lambda_1"),
        "mlp.out": out_of("mlp", scale="lambda_2"),
    },
    attn_write=("attention.o_proj", "lambda_1"),
    mlp_write=("mlp.fc2", "lambda_2"),
)
INTERNVL = SCALED.but(
    layers="encoder.layer",
    points=attention_points("attention", "attention.projection_layer"),
    attn_write=("attention.projection_layer", "lambda_1"),
)
DATA2VEC = SCALED.but(
    layers="encoder.layer",
    points={
        "attn.z": into("attention.output.dense"),
        "mlp.pre": out_of("intermediate.dense"),
        "mlp.act": into("output.dense"),
        "mlp.out": out_of("output", scale="lambda_2"),
    },
    attn_write=("attention.output.dense", "lambda_1"),
    mlp_write=("output.dense", "lambda_2"),
    lacks=dict.fromkeys(
        SEAM_POINTS, "Data2Vec computes attention inside its own module; read attn.z"
    ),
)
DINOV2 = VIT.but(
    layers="encoder.layer",
    points={"attn.out": out_of("layer_scale1"), "mlp.out": out_of("layer_scale2")},
    attn_write=("attention.o_proj", "layer_scale1"),
    mlp_write=("mlp.fc2", "layer_scale2"),
)
GATED = {"mlp.pre": out_of("mlp.gate_proj"), "mlp.act": into("mlp.down_proj")}

_BACKBONE = frozenset(
    {"apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"}
)
_SCALED = _BACKBONE | {
    "layer_scale_init_value", "drop_path_rate", "use_absolute_position_embeddings",
    "use_mask_token", "use_mean_pooling", "add_fpn", "pool_scales", "use_auxiliary_head",
    "auxiliary_channels", "auxiliary_num_convs", "auxiliary_concat_input", "auxiliary_loss_weight",
    "semantic_loss_ignore_index", "use_relative_position_bias",
    "use_shared_relative_position_bias",
}  # fmt: skip
_INTERNVL = frozenset(
    {
        "layer_scale_init_value", "norm_type", "projection_dropout",
        "use_absolute_position_embeddings", "use_mask_token", "use_mean_pooling", "use_qk_norm",
    }
)  # fmt: skip
_DINO = _BACKBONE | {
    "drop_path_rate", "layerscale_value", "mlp_ratio", "num_register_tokens", "use_mask_token",
    "use_swiglu_ffn", "use_gated_mlp", "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift",
    "query_bias", "key_bias", "value_bias", "proj_bias",
}  # fmt: skip


def _scaled(config: Any) -> Family:
    """BEiT and Data2Vec: the pooled patches have a norm of their own, so the stack may end without
    one."""
    tower = SCALED if config.model_type == "beit" else DATA2VEC
    if config.layer_scale_init_value <= 0:  # then the scale is the number 1
        tower = tower.but(
            points={name: out_of(tower.points[name].path) for name in ("attn.out", "mlp.out")},
            attn_write=tower.attn_write[:1],
            mlp_write=tower.mlp_write[:1],
        )
    return Family(config.model_type, {"": tower}, head=(), handles=_SCALED)


def _dinov2(config: Any) -> Family:
    tower = DINOV2
    if config.use_swiglu_ffn:
        tower = tower.but(points=GATED, mlp_write=("mlp.down_proj", "layer_scale2"))
    return Family(config.model_type, {"": tower}, head=(), handles=_DINO)


def _dinov3(config: Any) -> Family:
    pre = "mlp.gate_proj" if config.use_gated_mlp else "mlp.up_proj"
    tower = DINOV2.but(
        layers="model.layer",
        final_norm="norm",
        points={"mlp.pre": out_of(pre), "mlp.act": into("mlp.down_proj")},
        mlp_write=("mlp.down_proj", "layer_scale2"),
    )
    return Family("dinov3_vit", {"": tower}, head=(), handles=_DINO)


def _read_at_class_token(name: str) -> Family:
    return Family(name, {"": VIT}, head=("classifier",), pooled=0)


FAMILIES = {
    "vit": _read_at_class_token("vit"),
    "deit": _read_at_class_token("deit"),
    "vit_msn": _read_at_class_token("vit_msn"),
    "ijepa": Family("ijepa", {"": VIT}, head=()),
    "beit": _scaled,
    "data2vec-vision": _scaled,
    "internvl_vision": Family("internvl_vision", {"": INTERNVL}, head=(), handles=_INTERNVL),
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
}
