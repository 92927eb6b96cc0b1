"""The attention pattern: how much every head reads from every token, at every token.

Paper: textbook (Vaswani et al., "Attention Is All You Need", 2017)

    pattern[layer, head, query, key] = softmax over key of (q[query] . k[key] * scaling, capped and
        masked)

A row sums to one over the tokens that its query can see. With grouped queries every query head has
its own.

Reads as: where a head looks. Does not show what it takes from there, nor that it matters: a head
that has nothing to do often rests on the first token, and a value vector that is read may be close
to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.memory import available, predicted, refuse_above
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import label


def without_padding(
    pattern: Float[Tensor, "example head query key"], mask: Bool[Tensor, "example position"]
) -> Float[Tensor, "example head query key"]:
    """The pattern with NaN wherever the query or the key is padding."""
    real = mask[:, :, None] & mask[:, None, :]
    return pattern.masked_fill(~real[:, None], torch.nan)


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, layers: Sequence[int] | None = None) -> xr.DataArray:
    """The pattern of every head: (example, layer, head, query, key), NaN at padding, 0 where it may
    not look.

    layers: which ones (default all; negative ones count from the last). The tokens stand in the
    coordinates text_query and text_key. Raises SiteError for a layer that is not there, and for a
    model whose attention cannot be seen (Bloom); MemoryRefusal when the patterns, once in the
    model's memory and twice in the result, would not fit.
    """
    if layers is not None and not len(layers):
        raise InputError(
            "layers=[] asks for no pattern: name at least one layer, or leave it out for all."
        )
    names = (
        ["layers.*.attn.pattern"]
        if layers is None
        else [f"layers.{n}.attn.pattern" for n in layers]
    )
    sites = lm.layout.resolve(names)
    batch = lm.batch(inputs)
    narrow = "ask for fewer layers, or for fewer or shorter prompts at once"
    wide = torch.promote_types(lm.model.dtype, torch.float32)
    bits = torch.finfo(lm.model.dtype).bits
    # of the result, which copies once
    size = torch.finfo(wide).bits * predicted(lm, sites, batch) // bits
    refuse_above(
        2 * size + size // len(sites), available(torch.device("cpu")), "these patterns", narrow
    )
    seen = capture(lm, batch, *sites)
    shape = seen[sites[0]].shape
    pattern = torch.empty(shape[0], len(sites), *shape[1:], dtype=wide)
    for number, site in enumerate(sites):  # layer by layer, so that the whole is held once
        own = seen[site]
        pattern[:, number] = own if batch.mask is None else without_padding(own, batch.mask)
        if site not in sites[number + 1 :]:
            seen.release(site)
    coords: dict[str, Any] = {
        "layer": [site.layer for site in sites],
        "head": list(range(lm.dims.heads)),
    }
    if batch.mask is not None:  # a vision model has patches, which have no text and no padding
        coords |= batch.coords("query", "text_query") | batch.coords("key", "text_key")
    return label(
        pattern,
        ("example", "layer", "head", "query", "key"),
        name="pattern",
        method="heads.attention_pattern",
        provenance=lm.provenance,
        settings={"layers": coords["layer"]},
        coords=coords,
    )
