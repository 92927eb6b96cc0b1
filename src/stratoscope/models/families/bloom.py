"""Bloom: ALiBi attention in its own module, which also adds the residual; read before that
addition.

It does not call Transformers' attention interface, so what lives inside the attention function is
refused.
"""

from __future__ import annotations

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, into, out_of
from stratoscope.models.sites import SEAM_POINTS

_REASON = (
    "Bloom computes ALiBi attention inside its own module and never calls the attention "
    "interface; read attn.z"
)

TOWER = Tower(
    layers="h",
    embed="word_embeddings",
    final_norm="ln_f",
    points=RESIDUAL_POINTS
    | {
        "attn.z": into("self_attention.dense"),
        "attn.out": out_of("self_attention.dense"),
        "mlp.pre": out_of("mlp.dense_h_to_4h"),
        "mlp.act": into("mlp.dense_4h_to_h"),
        "mlp.out": out_of("mlp.dense_4h_to_h"),
    },
    attn_write=("self_attention.dense",),
    mlp_write=("mlp.dense_4h_to_h",),
    lacks=dict.fromkeys(SEAM_POINTS, _REASON),
)

FAMILIES = {"bloom": Family("bloom", {"": TOWER})}
