"""Path patching: change what some components send to some later inputs, and only there, and see
what the answer does.

Paper: textbook (Wang et al., "Interpretability in the Wild", 2022; Goldowsky-Dill et al., 2023)

    effect[edge] = (d(base; x_v <- x_v + sum_u delta_u, for every receiver v) - d(base)) /
        (d(source) - d(base))
    delta_u = write_u(source run) - write_u(base run)

d is the logit difference answer - foil at the last token. An edge runs from a sender u to a
receiver v as `engine.edges` defines them, keys and values per query head; or from several to
several, changed together. Nodes between senders and receivers stay as they were; everything after
the receivers is computed anew. direction="noise": base is the clean run, 1 means the edge alone
carries the whole difference. direction="denoise": base is the corrupt run.

null: the same edges with every delta replaced, position by position, by a random direction of the
same length.
Reads as: how much of the difference between the two prompts passes along this edge. Does not show
what both prompts share, and edges that back each other up can each have no effect alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import xarray as xr

from stratoscope.engine.edges import ends, exact
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair
from stratoscope.engine.sweep import Progress
from stratoscope.engine.wiring import Names, wiring
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "every change replaced, position by position, by a random direction of the same length"


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    paths: Sequence[tuple[Names, Names]] | None = None,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "noise",
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect and null of every path: (example, edge), with coordinates sender, receiver and their
    layers.

    inputs, corrupt: prompts in pairs of equal token length. answer, foil: `metric.Whole` texts are
    scored with all their tokens (`engine.edges.ends`). paths: (senders, receivers) by name,
    each one name or several; default every edge of the model alone: about 1.5 * (layers * heads)^2
    of them, twice with the null. Raises SiteError for a family without edges, InputError for an
    unknown name or a path that leads backwards.
    """
    prompts = pair(lm, inputs, corrupt, answer, foil, direction)
    wires = wiring(lm)
    ways = wires.edges if paths is None else wires.paths(paths)
    total, done = 2 * len(ways) * len(prompts.base), 0.0

    def advanced(count: int, rows: int) -> None:
        nonlocal done
        done += count / rows
        if progress:
            progress(round(done), total)

    slopes = []
    for rows in ends(lm, prompts):
        step_done = partial(advanced, rows=len(rows))
        each = [
            exact(one, change, ways, advanced=step_done)
            for one in rows
            for change in (one.delta, one.null(seed))
        ]
        slopes.append(torch.stack(each).unflatten(0, (-1, 2)).sum(dim=0))
    differences = torch.stack(slopes, dim=-1)  # kind, edge, example
    effect, null = prompts.normalise(differences.float()).transpose(1, 2)
    return dataset(
        {"effect": (("example", "edge"), effect), "null": (("example", "edge"), null)}
        | prompts.differences,
        method="circuits.path_patching",
        provenance=lm.provenance,
        settings={"direction": direction},
        seed=seed,
        coords=prompts.coords | wires.coords(ways),
        null_kind=NULL,
        notes=prompts.notes(null),
    )
