"""GPT-NeoX and Pythia: attention and MLP read the same residual (parallel blocks), unless the
config says not."""

from __future__ import annotations

from typing import Any

from stratoscope.models.family import RESIDUAL_POINTS, Family, Tower, attention_points, into, out_of

SEQUENTIAL = Tower(
    layers="layers",
    embed="embed_in",
    final_norm="final_layer_norm",
    points=RESIDUAL_POINTS
    | attention_points("attention", "attention.dense")
    | {
        "attn.out": out_of("attention"),
        "mlp.pre": out_of("mlp.dense_h_to_4h"),
        "mlp.act": into("mlp.dense_4h_to_h"),
        "mlp.out": out_of("mlp"),
    },
    attn_write=("attention.dense",),
    mlp_write=("mlp.dense_4h_to_h",),
)
PARALLEL = SEQUENTIAL.but(
    residual="parallel",
    lacks={
        "resid_mid": "attention and MLP run in parallel on the same residual, so there is no "
        "residual between them"
    },
)


def _family(config: Any) -> Family:
    tower = PARALLEL if config.use_parallel_residual else SEQUENTIAL
    return Family("gpt_neox", {"": tower}, handles=frozenset({"use_parallel_residual"}))


FAMILIES = {"gpt_neox": _family}
