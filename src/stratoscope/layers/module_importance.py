"""Module importance: how far attention, MLP and whole block each turn the residual stream, layer by
layer.

Paper: llm-drop

    importance[layer] = mean over tokens of 1 - cos(x, y)

    attention: x = resid_pre, y = resid_mid;   mlp: x = resid_mid, y = resid_post;   block: x =
                                               resid_pre, y = resid_post

y is x plus what the module writes; where attention and MLP run in parallel, each is taken alone: y
= resid_pre + out. In encoders that norm after each addition, y is taken after the norm. Every token
counts alike, as in the paper.

Reads as: what may be left out at little cost, lowest first; `least` gives the names that
`editing.drop_modules` takes. Does not show what a module is for: a small turn, made early, can be
what all later layers need, and a cosine does not see how much longer the stream becomes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.trace import Trace, capture
from stratoscope.errors import InputError
from stratoscope.models import source
from stratoscope.models.lm import LM
from stratoscope.results import dataset

Kind = Literal["attention", "mlp", "block", "joint"]
SITES = {"attention": ("attn.out",), "mlp": ("mlp.out",), "block": ("attn.out", "mlp.out")}


def turned(
    x: Float[Tensor, "layer example position dim"],
    y: Float[Tensor, "layer example position dim"],
    mask: Bool[Tensor, "example position"],
) -> Float[Tensor, "example layer"]:
    """1 - cos(x, y), its mean over each example's real tokens."""
    away = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)
    return ((away * mask).sum(dim=-1) / mask.sum(dim=-1)).T.float()


@torch.no_grad()
def measure(lm: LM, inputs: Any) -> xr.Dataset:
    """Importance of attention, mlp and block: (example, layer) each.

    All positions of all layers are held at once: give long texts in several calls. Raises
    MemoryRefusal when they would not fit, SiteError for an architecture without these sites.
    """
    source.refuse(lm, "what attention and cross-attention do to the stream is not told apart here")
    batch = lm.batch(inputs)
    parallel = lm.family.towers[""].residual == "parallel"
    inside = ("attn.out", "mlp.out") if parallel else ("resid_mid",)
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    seen = capture(lm, batch, *(f"layers.*.{point}" for point in ("resid_pre", *inside)), last)
    mask = (
        batch.mask if batch.mask is not None else torch.ones(seen[last].shape[:2], dtype=torch.bool)
    )
    pairs = _pairs(seen, parallel, seen[last])
    texts = {"example_text": batch.coords()["example_text"]} if batch.tokens else {}
    return dataset(
        {
            kind: (("example", "layer"), turned(x, y, mask.to(x.device)))
            for kind, (x, y) in pairs.items()
        },
        method="layers.module_importance",
        provenance=lm.provenance,
        coords={"layer": list(range(lm.dims.layers))} | texts,
    )


def least(importance: xr.Dataset, n: int, kind: Kind) -> list[str]:
    """The sites to drop: the n modules of one kind, or of attention and MLP together ("joint"),
    that matter least.

    importance: as `measure` gives it; examples are averaged. Raises InputError when there are not
    as many.
    """
    kinds = ("attention", "mlp") if kind == "joint" else (kind,)
    scores = [
        (float(value), layer, each)
        for each in kinds
        for layer, value in enumerate(importance[each].mean("example").values)
    ]
    if not 0 <= n <= len(scores):
        raise InputError(f"{n} modules of kind {kind!r}: there are {len(scores)}.")
    return [
        f"layers.{layer}.{site}" for _, layer, each in sorted(scores)[:n] for site in SITES[each]
    ]


def _pairs(seen: Trace, parallel: bool, end: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Before and after each kind of module, all layers: (layer, example, position, dim)."""
    pre = seen.stack("layers.*.resid_pre")
    post = torch.cat([pre[1:], end[None]])
    if parallel:
        attention, mlp = (
            pre + seen.stack(f"layers.*.{point}") for point in ("attn.out", "mlp.out")
        )
        return {"attention": (pre, attention), "mlp": (pre, mlp), "block": (pre, post)}
    mid = seen.stack("layers.*.resid_mid")
    return {"attention": (pre, mid), "mlp": (mid, post), "block": (pre, post)}
