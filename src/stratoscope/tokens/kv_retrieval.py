"""KV retrieval: each window of a long text reads only those past keys that a probe query finds.

Paper: actqkv

    phi[j]      = sum over dims (q[j] - mean q)^2 / var q          over the queries j of a window
    probe       = sum over j softmax(phi)[j] q[j]
    score[b]    = probe . (mean key of block b)                    after rotation, all heads in one
    read        = the first keys, those just before the window, the blocks of the best scores
    decoding    : a window is one token; a layer's room for blocks is in proportion to the entropy
                  of softmax(score / sqrt(dims)) over the prompt's last window (`layered`)

A window is `local` tokens. It reads its own keys, the `first` of the text, the `local` before it,
and as many whole blocks as `budget` has room for beside these. Other probes: the window's mean or
last query, or the best of all its queries ("max", which scores every query against every block).

Reads as: what the model makes of a text when its memory is so small, once outputs with and without
the edit are compared. Does not show how fast or small a cache would be: here keys that are not read
are masked, and stay. The softmax of phi is nearly all on one token where dimensions are many.
Cost: attention as the eager kernel computes it, and one product of a probe with the blocks for each
window and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models import finite
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens import _kv_blocks as kv
from stratoscope.tokens import _kv_windows as windows
from stratoscope.tokens._kv_edit import Retrieval

AXES = {"probe": "what past keys are retrieved by: a probe query, or a rival of one"}
RIVALS = ("layered", "recent", "attended")


def edit(
    lm: LM,
    request: int,
    *,
    probe: str = "activation",
    block: int = 32,
    local: int = 64,
    first: int = 8,
    layered: bool = True,
) -> Retrieval:
    """An edit under which a window reads `request` past keys at most:
    `with kv_retrieval.edit(lm, 192): generate(lm, long_text)`.

    probe: "activation", "mean", "last" or "max". block: keys retrieved together; local: tokens of a
    window, and past keys just before it that are always read; first: keys at the text's beginning
    that are. layered: while generating, share the room for blocks out among the layers; each has
    the same otherwise. Raises InputError where the budget has no room for first and local, or for
    another probe; SiteError for a model that does not read a text from left to right, or whose
    attention cannot be seen; in the run, for a cache that lets keys go.
    """
    options = {"block": block, "local": local, "first": first}
    _refuse(lm, request, **options)
    if probe not in kv.PROBES:
        raise InputError(f"probe={probe!r}: choose one of {', '.join(kv.PROBES)}.")
    return Retrieval(lm, request, probe=probe, layered=layered, **options)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    budget: int,
    needle: Sequence[tuple[int, int]] | None = None,
    block: int = 32,
    local: int = 64,
    first: int = 8,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """What the last window of each text would retrieve in an unchanged model: attention, recall
    (probe, example, layer), null_attention, null_recall (draw, example, layer), entropy, room
    (example, layer), read (example, layer, position).

    attention: of what the window's queries give, all heads together, to past keys between the first
    and the local ones, the share that goes to keys that are retrieved; recall: the share of the
    needle's keys that are. NaN where there are no such keys. needle: (begin, end) of its positions
    in each text. probe: those of `edit` with one room for all layers, "layered" with the activation
    probe's rooms by entropy, "recent" for the nearest blocks, "attended" for those with most
    attention: of blocks alike in size what no probe can pass. read: what the activation probe
    retrieves. null: random blocks. Raises as `edit` does, and InputError for a needle not in its
    text.
    """
    _refuse(lm, budget, block, local, first)
    batch = lm.batch(inputs)
    spans = windows.spans(needle, batch.host_lengths.tolist())
    seen = windows.last_windows(lm, batch, (block, local, first))
    finite.refuse({f"the attention of layer {n}": one["weight"] for n, one in enumerate(seen)})
    total, layers = budget - first - local, len(seen)
    entropies = torch.stack([kv.entropy(one["activation"] / one["width"]) for one in seen])
    rooms = kv.by_entropy(entropies, layers * total)
    generators = [np.random.default_rng([seed, draw]) for draw in range(draws)]
    found: dict[str, list[Tensor]] = {name: [] for name in ("own", "null", "read")}
    for layer, one in enumerate(seen):
        held, even = one["held"], torch.full_like(rooms[0], total)
        wanted = torch.stack([one["weight"] * (held.member >= 0), spans.to(one["weight"])])
        reads = [kv.read(one[name], held, even) for name in kv.PROBES]
        reads.append(kv.read(one["activation"], held, rooms[layer]))
        numbers = torch.arange(held.size.shape[1], device=held.size.device).double()
        reads.append(kv.read(windows.existing(numbers, held), held, even))
        reads.append(
            kv.read(windows.existing(windows.by_block(one["weight"], held), held), held, even)
        )
        drawn = [torch.tensor(g.random(len(numbers))).to(numbers) for g in generators]
        random = [kv.read(windows.existing(row, held), held, even) for row in drawn]
        found["own"].append(torch.stack([windows.part(wanted, keys) for keys in reads]))
        found["null"].append(torch.stack([windows.part(wanted, keys) for keys in random])
                             if random else wanted.new_zeros(0, 2, len(even)))  # fmt: skip
        found["read"].append(reads[0])
    settings = {"budget": budget, "block": block, "local": local, "first": first, "draws": draws}
    return _labelled(lm, batch, found, entropies, rooms, settings, seed)


def _labelled(
    lm: LM,
    batch: Any,
    found: dict[str, list[Tensor]],
    entropies: Tensor,
    rooms: Tensor,
    settings: dict[str, Any],
    seed: int,
) -> xr.Dataset:
    own, null = (torch.stack(found[name], dim=-1) for name in ("own", "null"))
    ids, mask = batch.text
    read = torch.stack(found["read"], dim=1)[..., : ids.shape[1]].float()
    read = read.masked_fill(~mask[:, None].to(read.device), torch.nan)
    axes, pair = ("probe", "example", "layer"), ("example", "layer")
    return dataset(
        {
            "attention": (axes, own[:, 0]),
            "recall": (axes, own[:, 1]),
            "null_attention": (("draw", *pair), null[:, 0]),
            "null_recall": (("draw", *pair), null[:, 1]),
            "entropy": (pair, entropies.T),
            "room": (pair, rooms.T),
            "read": ((*pair, "position"), read),
        },
        method="tokens.kv_retrieval",
        provenance=lm.provenance,
        settings=settings,
        seed=seed,
        coords={"probe": [*kv.PROBES, *RIVALS]} | batch.coords(),
        null_kind="as many random blocks",
    )


def _refuse(lm: LM, budget: int, block: int, local: int, first: int) -> None:
    if block < 1 or local < 1 or first < 0:
        raise InputError(f"block={block}, local={local}, first={first}: 1, 1 and 0 at least.")
    if budget < first + local:
        raise InputError(
            f"a budget of {budget} keys has no room for the first {first} and the {local} before a "
            f"window, which are always read: give {first + local} or more."
        )
    windows.sites(lm)
