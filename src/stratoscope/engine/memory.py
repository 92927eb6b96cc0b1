"""Memory is predicted before it is taken (law 6)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from stratoscope.errors import MemoryRefusal
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site

_TAKEN_APART = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
)  # seen through the attention seam


def available(device: torch.device) -> int:
    """Bytes that can be taken now on the device (host memory for a CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def predicted(lm: LM, sites: Iterable[Site], batch: Batch, positions: int | None = None) -> int:
    """Bytes that capturing the sites takes; positions: how many are kept, None for all. Vision
    sites count as nothing: how many patches there are is known only to the model."""
    if batch.mask is None:
        return 0
    width = batch.mask.shape[1]
    dims = lm.dims
    sizes = {
        "example": len(batch),
        "position": positions or width,
        "query": positions or width,
        "key": width,
    }
    sizes |= {
        "dim": dims.dim,
        "head": dims.heads,
        "kv_head": dims.kv_heads,
        "head_dim": dims.head_dim,
    }
    sizes |= {"neuron": dims.neurons, "vocab": dims.vocab, "expert": 1}
    values = 0
    for site in sites:
        if site.tower == "" and site.point != "projector":
            count = 1
            for axis in site.axes:
                count *= sizes[axis]
            values += count
    return values * torch.finfo(lm.model.dtype).bits // 8


def working(lm: LM, sites: Iterable[Site], batch: Batch) -> int:
    """Bytes that one layer's attention takes while it is taken apart for these sites: scores before
    and after scaling, masks and softmax stand beside each other. Three to four copies live, and the
    process was seen to hold six."""
    if batch.mask is None or not any(
        site.tower == "" and site.point in _TAKEN_APART for site in sites
    ):
        return 0
    return (
        6 * max(4, lm.model.dtype.itemsize) * len(batch) * lm.dims.heads * batch.mask.shape[1] ** 2
    )


def refuse_above(needed: int, free: int, what: str, narrow: str) -> None:
    """Raise MemoryRefusal when `needed` bytes exceed nine tenths of `free`."""
    if needed > 0.9 * free:
        raise MemoryRefusal(
            f"{what} would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            f"{narrow}."
        )
