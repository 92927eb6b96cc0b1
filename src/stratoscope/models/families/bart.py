"""Encoder-decoders of BART's layout: with a norm after each addition (BART, Marian) or before each
part (mBART, Pegasus, M2M-100); and Whisper, whose encoder reads a spectrogram.
"""

from __future__ import annotations

from stratoscope.models.family import (
    RESIDUAL_POINTS,
    Family,
    Point,
    Tower,
    attention_points,
    into,
    out_of,
)

_CROSS = "encoder_attn"
ENCODER = Tower(
    layers="encoder.layers",
    embed="encoder.embed_tokens",
    final_norm="encoder.layer_norm",
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
    causal=False,
)
DECODER = ENCODER.but(
    layers="decoder.layers",
    embed="decoder.embed_tokens",
    final_norm="decoder.layer_norm",
    points={
        "resid_mid": Point("", "sum", start="encoder_attn_layer_norm"),
        "cross.out": out_of(_CROSS),
    }
    | attention_points(_CROSS, f"{_CROSS}.out_proj", "cross"),
    cross_write=(f"{_CROSS}.out_proj",),
    causal=True,
)
_ENCODER_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_DECODER_NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
POST_ENCODER = ENCODER.but(
    final_norm=None,
    residual="post-norm",
    norms=_ENCODER_NORMS,
    points={"resid_mid": out_of("self_attn_layer_norm")},
)
POST_DECODER = DECODER.but(
    final_norm=None,
    residual="post-norm",
    norms=_DECODER_NORMS,
    points={"resid_mid": out_of("encoder_attn_layer_norm")},
)
# Whisper's positions come of a spectrogram by two convolutions
EAR = ENCODER.but(embed=None, takes="input_features")
_HANDLED = frozenset(
    {
        "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads",
        "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_layerdrop",
        "decoder_layerdrop", "scale_embedding", "forced_eos_token_id", "forced_bos_token_id",
        "is_encoder_decoder", "max_length", "normalize_before", "normalize_embedding",
        "add_final_layer_norm", "add_bias_logits", "static_position_embeddings",
        "extra_pos_embeddings", "share_encoder_decoder_embeddings", "decoder_vocab_size",
        "early_stopping", "num_beams", "length_penalty", "no_repeat_ngram_size", "min_length",
    }
)  # fmt: skip
SOUND = _HANDLED | {
    "num_mel_bins", "max_source_positions", "max_target_positions", "suppress_tokens",
    "begin_suppress_tokens", "median_filter_width", "use_weighted_layer_sum",
    "classifier_proj_size", "apply_spec_augment", "mask_time_prob", "mask_time_length",
    "mask_time_min_masks", "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks",
    "forced_decoder_ids",
}  # fmt: skip


def _join(name: str, decoder: Tower, encoder: Tower, **more) -> Family:
    towers = {"": decoder, "encoder": encoder}
    options = {"handles": _HANDLED, "logit_bias": "final_logits_bias"} | more
    return Family(name, towers, main="decoder", source="encoder", **options)


FAMILIES = {name: _join(name, POST_DECODER, POST_ENCODER) for name in ("bart", "marian")}
FAMILIES |= {name: _join(name, DECODER, ENCODER) for name in ("mbart", "pegasus", "m2m_100")}
FAMILIES["whisper"] = _join(
    "whisper", DECODER, EAR, head=("proj_out",), handles=SOUND, logit_bias=""
)
