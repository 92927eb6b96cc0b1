"""Memory is predicted before it is taken (law 6)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch

from stratoscope.errors import MemoryRefusal
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


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
    """Bytes that capturing the sites takes; positions: how many are kept, None for all. What comes
    of pictures counts as nothing: how many patches there are is known only to the model."""
    values = 0
    for site in sites:
        width = _width(lm, batch, site.tower)
        if not width or site.point == "projector":
            continue
        keys = (_width(lm, batch, lm.family.source) if site.source else width) or 0
        sizes = {
            "example": len(batch),
            "position": positions or (keys if site.source == "position" else width),
            "query": positions or width,
            "key": keys,
            "vocab": lm.dims.vocab,
            "expert": 1,
        } | lm.layout.sizes(site)
        values += prod(sizes[axis] for axis in site.axes)
    return values * torch.finfo(lm.model.dtype).bits // 8


def _width(lm: LM, batch: Batch, tower: str) -> int | None:
    """How many positions a tower has in this batch, None where only the model knows."""
    there = batch.read_by(tower)
    if there is not None and there.mask is not None:
        return there.mask.shape[1]
    sound = there is not None and tower  # padded or cut to one length
    return getattr(lm.layout.config(tower), "max_source_positions", None) if sound else None


def working(lm: LM, sites: Iterable[Site], batch: Batch) -> int:
    """Bytes that one layer's attention takes while it is taken apart for these sites: scores before
    and after scaling, masks and softmax stand beside each other. Three to four copies live, and the
    process was seen to hold six."""
    most = 0
    for site in sites:
        width = _width(lm, batch, site.tower) or 0
        keys = (_width(lm, batch, lm.family.source) or 0) if site.source else width
        if site.seam:
            most = max(most, lm.layout.dims[site.tower].heads * width * keys)
    return 6 * max(4, lm.model.dtype.itemsize) * len(batch) * most


def refuse_above(needed: int, free: int, what: str, narrow: str) -> None:
    """Raise MemoryRefusal when `needed` bytes exceed nine tenths of `free`."""
    if needed > 0.9 * free:
        raise MemoryRefusal(
            f"{what} would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            f"{narrow}."
        )
