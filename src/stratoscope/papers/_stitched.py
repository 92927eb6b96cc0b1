"""Pairs of small networks for `relative_representations.py`: trained alike with anchors and
without, and stitched in every way that `embeddings.stitching.crossed` knows.

No network is in two pairs, so that the pair is the independent unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor, nn

from stratoscope.claims import Measured
from stratoscope.embeddings import stitching as st
from stratoscope.lab import data, small_nets
from stratoscope.maths.resample import interval

ANCHORS, WIDTH, STEPS, TRAIN = 300, 128, 400, 20_000
Build = Callable[[Tensor | None], st.Stitched]  # of anchors, or none
Score = Callable[[nn.Module], float]


def pairs(
    seed: int,
    count: int,
    kinds: Sequence[Build],
    score: Score,
    *,
    redraw: bool = False,
    **options: Any,
) -> dict[str, np.ndarray]:
    """The scores of `st.crossed` by name, (pair); no net is in two pairs. redraw: the nets draw
    their pictures, instead of telling the class. The first training pictures are anchors."""
    x, y = small_nets.ready(data("mnist").train, TRAIN, seed)
    anchors, rows = x[:ANCHORS], []
    for pair in range(count):
        members = [(kind, 1000 * seed + 2 * pair + i) for i, kind in enumerate(kinds)]
        anchored, plain = (
            [
                small_nets.train(
                    partial(kind, known), x, x if redraw else y, seed=own, steps=STEPS, **options
                )
                for kind, own in members
            ]
            for known in (anchors, None)
        )
        idle = [small_nets.fresh(partial(kind, None), 500 + own).encoder for kind, own in members]
        rows.append(st.crossed(anchored, plain, idle, anchors, score, seed=pair))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def measured(units: dict[str, np.ndarray], better: int, name: str, **more: Any) -> Measured:
    """better: 1 where more is better, -1 where less is."""
    best = max(("affine", "orthogonal"), key=lambda how: better * units[how].mean())
    units["over_map"] = better * (units["stitched"] - units[best])
    null = {how: interval(units[how]) for how in ("absolute", "shuffled", "untrained")}
    names = ["native", "stitched", "affine", "orthogonal", *null]
    return Measured(
        units={how: row for how, row in units.items() if how not in null},
        null={how: each.value for how, each in null.items()} | more,
        interval={how: (each.low, each.high) for how, each in null.items()},
        n=len(units["stitched"]),
        figure=xr.DataArray(
            [units[how].mean() for how in names],
            {"way": names},
            ["way"],
            name=name,
            attrs={"title": f"{name}, by how the nets are joined"},
        ),
        note=f"Of the two maps {best} is the better one.",
    )


def mlp(anchors: Tensor | None) -> st.Stitched:
    """Two hidden layers of 128, and a decoder of one that reads them, or their cosines."""
    return st.Stitched(small_nets.mlp(WIDTH, 2)[:-1], _reader(anchors), anchors)


def cnn(anchors: Tensor | None) -> st.Stitched:
    encoder = nn.Sequential(small_nets.encoder(), nn.Linear(64, WIDTH), nn.ReLU())
    return st.Stitched(encoder, _reader(anchors), anchors)


def _reader(anchors: Tensor | None) -> nn.Module:
    width = WIDTH if anchors is None else len(anchors)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))


def autoencoder(anchors: Tensor | None) -> st.Stitched:
    decoder = small_nets.decoder(64 if anchors is None else len(anchors))
    return st.Stitched(small_nets.encoder(), decoder, anchors)
