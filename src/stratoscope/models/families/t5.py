"""T5: an encoder and a decoder with RMS norms before each part, a bias of relative positions in the
scores, which are not scaled, and cross-attention between the two. Its encoder alone, too.
"""

from __future__ import annotations

from typing import Any

from stratoscope.models.family import Family, Tower, attention_points, into, out_of

_AT = "layer.0.SelfAttention"
_CROSS = "layer.1.EncDecAttention"


def _mlp(path: str, gated: bool) -> dict[str, Any]:
    """The points of a feed-forward module, and what writes."""
    points = {
        "mlp.pre": out_of(f"{path}.wi_0" if gated else f"{path}.wi"),
        "mlp.act": into(f"{path}.wo"),
        "mlp.out": out_of(path),
    }
    return {"points": points, "mlp_write": (f"{path}.wo",)}


ENCODER = Tower(
    layers="encoder.block",
    embed="encoder.embed_tokens",
    final_norm="encoder.final_layer_norm",
    points={"resid_pre": into(""), "resid_mid": out_of("layer.0"), "resid_post": out_of("")}
    | attention_points(_AT, f"{_AT}.o")
    | {"attn.out": out_of(_AT)},
    attn_write=(f"{_AT}.o",),
    mlp_write=(),
    causal=False,
)
DECODER = ENCODER.but(
    layers="decoder.block",
    embed="decoder.embed_tokens",
    final_norm="decoder.final_layer_norm",
    points={"resid_mid": out_of("layer.1"), "cross.out": out_of(_CROSS)}
    | attention_points(_CROSS, f"{_CROSS}.o", "cross"),
    cross_write=(f"{_CROSS}.o",),
    causal=True,
)
_HANDLED = frozenset(
    {
        "d_kv", "d_ff", "d_model", "num_layers", "num_decoder_layers", "dropout_rate",
        "feed_forward_proj", "dense_act_fn", "is_gated_act", "relative_attention_num_buckets",
        "relative_attention_max_distance", "scale_decoder_outputs", "is_encoder_decoder",
        "tokenizer_class",
    }
)  # fmt: skip


def _t5(config: Any) -> Family:
    gated = config.is_gated_act
    scaled = getattr(config, "scale_decoder_outputs", False)  # T5 1.0
    encoder = ENCODER.but(**_mlp("layer.1.DenseReluDense", gated))
    if not config.is_encoder_decoder:  # T5EncoderModel
        return Family(config.model_type, {"": encoder}, head=(), handles=_HANDLED, main="encoder")
    return Family(
        config.model_type,
        {"": DECODER.but(**_mlp("layer.2.DenseReluDense", gated)), "encoder": encoder},
        logit_scale=config.d_model**-0.5 if scaled else 1.0,
        handles=_HANDLED,
        main="decoder",
        source="encoder",
    )


FAMILIES = {"t5": _t5, "mt5": _t5, "umt5": _t5}
