"""Encoders of sound waves: wav2vec 2.0, HuBERT and Data2Vec. Convolutions turn samples into frames;
the layers have a norm after each addition, or, in the large "stable" ones, before each part.
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

PRE_NORM = Tower(
    layers="encoder.layers",
    embed="feature_projection",
    final_norm="encoder.layer_norm",
    points=RESIDUAL_POINTS
    | attention_points("attention", "attention.out_proj")
    | {
        "attn.out": out_of("attention"),
        "mlp.pre": out_of("feed_forward.intermediate_dense"),
        "mlp.act": into("feed_forward.output_dense"),
        "mlp.out": out_of("feed_forward"),
    },
    attn_write=("attention.out_proj",),
    mlp_write=("feed_forward.output_dense",),
    causal=False,
    takes="input_values",
    lengths="_get_feat_extract_output_lengths",
)
POST_NORM = PRE_NORM.but(
    final_norm=None,
    residual="post-norm",
    norms=("layer_norm", "final_layer_norm"),
    points={"resid_mid": out_of("layer_norm")},
)
_HANDLED = frozenset(
    {
        "feat_proj_dropout", "feat_quantizer_dropout", "feat_extract_norm", "final_dropout",
        "feat_extract_activation", "conv_dim", "conv_stride", "conv_kernel", "conv_bias",
        "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm",
        "apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks",
        "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks", "num_negatives",
        "num_codevectors_per_group", "num_codevector_groups", "contrastive_logits_temperature",
        "codevector_dim", "proj_codevector_dim", "diversity_loss_weight", "ctc_loss_reduction",
        "ctc_zero_infinity", "use_weighted_layer_sum", "classifier_proj_size", "tdnn_dim",
        "tdnn_kernel", "tdnn_dilation", "xvector_output_dim", "feat_proj_layer_norm",
        "num_feat_extract_layers", "output_hidden_size", "conv_pos_kernel_size",
        "conv_pos_batch_norm",
    }
)  # fmt: skip


def _family(config: Any) -> Family:
    stable = getattr(config, "do_stable_layer_norm", False)
    # a first convolution normed over the whole series; convolutions of positions, one on the other
    alone = (
        getattr(config, "feat_extract_norm", "layer") == "group"
        or config.model_type == "data2vec-audio"
    )
    tower = (PRE_NORM if stable else POST_NORM).but(alone=alone)
    return Family(config.model_type, {"": tower}, handles=_HANDLED)


FAMILIES = {"wav2vec2": _family, "hubert": _family, "data2vec-audio": _family}
