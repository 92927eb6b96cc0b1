"""PatchTST: an encoder of time series cut into patches. Each channel is a series of its own, so the
rows of an example are its channels, and its positions the patches."""

from __future__ import annotations

from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import (
    RESIDUAL_POINTS,
    Family,
    Tower,
    attention_points,
    into,
    out_of,
)

PRE_NORM = Tower(
    layers="encoder.layers",
    embed="encoder.embedder",
    points=RESIDUAL_POINTS
    | attention_points("self_attn", "self_attn.out_proj")
    | {
        "attn.out": out_of("self_attn"),
        "mlp.pre": out_of("ff.0"),
        "mlp.act": into("ff.3"),
        "mlp.out": out_of("ff"),
    },
    attn_write=("self_attn.out_proj",),
    mlp_write=("ff.3",),
    causal=False,
    mixes=True,  # its layers take all channels of an example at once: their rows are not packed
    takes="past_values",
    rows="num_input_channels",
)
POST_NORM = PRE_NORM.but(
    residual="post-norm",
    norms=("norm_sublayer1", "norm_sublayer3"),
    points={"resid_mid": out_of("norm_sublayer1")},
)
_HANDLED = frozenset(
    {
        "num_input_channels", "context_length", "distribution_output", "loss", "patch_length",
        "patch_stride", "share_embedding", "d_model", "norm_type", "norm_eps",
        "positional_dropout", "path_dropout", "ff_dropout", "pre_norm",
        "positional_encoding_type", "use_cls_token", "share_projection", "scaling",
        "do_mask_input", "mask_type", "random_mask_ratio", "num_forecast_mask_patches",
        "channel_consistent_masking", "unmasked_channel_indices", "mask_value", "pooling_type",
        "head_dropout", "prediction_length", "num_targets", "output_range",
        "num_parallel_samples",
    }
)  # fmt: skip


def _patchtst(config: Any) -> Family:
    if config.channel_attention:
        raise FamilyError(
            "this patchtst sets `channel_attention`: each layer calls its attention twice, along "
            "the patches and along the channels, so that its sites have no one value; refused."
        )
    tower = PRE_NORM if config.pre_norm else POST_NORM
    return Family("patchtst", {"": tower}, head=(), handles=_HANDLED)


FAMILIES = {"patchtst": _patchtst}
