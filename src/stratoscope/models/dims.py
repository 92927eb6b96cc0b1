"""Sizes of a tower, measured on its projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stratoscope.errors import FamilyError
from stratoscope.models.family import Tower
from stratoscope.models.weights import shape

if TYPE_CHECKING:
    from stratoscope.models.layout import Layout


@dataclass(frozen=True)
class Dims:
    """Sizes of one tower: how many layers, query heads, key/value heads, and how wide each axis
    is; channels are a state space's."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    head_dim: int
    neurons: int
    vocab: int
    channels: int = 0


def dims_of(layout: Layout, towers: Sequence[Tower], name: str) -> Dims:
    """Sizes of a tower whose layers hold what `towers` say, as its projections show. Raises
    FamilyError where heads cannot be told apart."""
    config = layout.config(name)
    layers = list(zip(layout.layers[name], towers))
    attend = next(((at, t) for at, t in layers if "attn.z" in t.points), None)
    think = next(((at, t) for at, t in layers if t.mlp_write), None)
    # an encoder and a decoder may differ, and then share the keys that others have
    own = getattr(config, f"{name or layout.family.main}_attention_heads", None)
    heads = own or next((n for key in _HEADS if (n := getattr(config, key, None))), 0)
    heads = heads if attend else 0
    sizes = attend and shape(z := layout.part(attend[0], attend[1].points["attn.z"].path))
    if attend and not (sizes and heads):
        raise FamilyError(
            f"family `{layout.family.name}`: {type(z).__name__} at "
            f"`{attend[1].points['attn.z'].path}` has no matrix, "
            f"or {type(config).__name__} no number of heads, so heads cannot be told apart."
        )
    dim, width = sizes or (config.hidden_size, 0)
    written = think and shape(layout.part(think[0], think[1].mlp_write[0]))
    scan = next(((at, t) for at, t in layers if t.mix_write), None)
    mixed = scan and shape(layout.part(scan[0], scan[1].mix_write[0]))
    return Dims(
        layers=len(layers),
        heads=heads,
        kv_heads=0 if not attend else heads if own else _kv_heads(config) or heads,
        dim=dim,
        head_dim=width // heads if heads else 0,
        neurons=written[1] if written else 0,
        vocab=getattr(config, "vocab_size", 0) or 0,
        channels=mixed[1] if mixed else 0,
    )


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def _kv_heads(config: Any) -> int | None:
    """How many key/value heads the config says, or None."""
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    keys = ("num_key_value_heads", "num_kv_heads")
    return next((n for key in keys if isinstance(n := getattr(config, key, None), int)), None)
