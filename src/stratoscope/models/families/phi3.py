"""Phi-3: q, k, v in one projection, gate and up in another (gate first)."""

from __future__ import annotations

from stratoscope.models.families.llama import TOWER
from stratoscope.models.family import Family, out_of

FAMILIES = {
    "phi3": Family(
        "phi3",
        {"": TOWER.but(points={"mlp.pre": out_of("mlp.gate_up_proj", part=(0, 2))})},
        handles=frozenset(
            {"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"}
        ),
    )
}
