"""The base run of a sweep: what packed cells start from, and whether they can be packed at all.

The base inputs run once: for the metric, for the values at every changed site, and for what
`packed` needs of every layer, its keys and values, its mask, the arguments it is called with. Where
the attention kernel is not torch's SDPA, keys and values are heard in a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from stratoscope.engine import outside
from stratoscope.engine.intervene import Intervention
from stratoscope.models.attention import (
    looks_ahead,
    masked,
    overheard,
    repeat_heads,
    scores_of,
    seam,
    softmax_visible,
)
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward
from stratoscope.models.weights import row_independent

# sites whose tensor has one row for each position, so that cells can share a matrix and still be
# edited apart
PACKED_POINTS = frozenset(
    {
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.z",
        "attn.out",
        "mlp.pre",
        "mlp.act",
    }
    | {"mlp.out", "mlp.router"}
)


@dataclass
class Base:
    """The base run: its metric, and for each layer what enters it, its keys and values, its mask
    and its arguments."""

    batch: Batch
    # what the metric is given: (example, vocab), or (example, dim) of a model without a read-out
    answers: Tensor
    metric: Tensor
    values: dict[Site, Tensor]
    causal: bool
    depth: int
    residual: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)  # (example, kv_head, position, head_dim)
    vals: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    # what each layer's mask lets a real token see: "all", "causal" (itself and all before), or ""
    order: list[str] = field(default_factory=list)
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    shareable: bool = True
    width: int = 0  # positions, padding included
    lengths: list[int] = field(default_factory=list)  # of each example
    # the position of each example that the metric reads
    reads: list[int] = field(default_factory=list)
    # changes made outside the sweep: part of every cell
    outer: list[Intervention] = field(default_factory=list)


def read(lm: LM, resid: Tensor) -> Tensor:
    """(row, dim) final residuals -> (row, output); as they are for a model without a read-out (a
    bare encoder)."""
    return resid if lm.readout.kind == "vectors" else lm.readout(resid)


def answers(lm: LM, resid: Tensor, batch: Batch) -> Tensor:
    """(example, position, dim) final residuals -> (example, output): what the metric is given of
    each example."""
    if lm.readout.kind != "vectors":
        return lm.readout.of(resid, batch)
    return resid[torch.arange(len(batch)), lm.readout.positions(batch)]


def shareable(lm: LM, cell: Sequence[Intervention]) -> bool:
    """Whether a cell can be packed: only sites inside the main stack's layers that have one row for
    each position."""
    return all(
        c.site.tower == "" and c.site.layer is not None and c.site.point in PACKED_POINTS
        for c in cell
    )


def base_run(
    lm: LM,
    batch: Batch,
    sites: set[Site],
    metric: Callable[[Tensor, Tensor], Tensor],
) -> Base:
    """Run the base inputs once, keeping what packed cells start from and the base value at every
    changed site."""
    streams = {
        site
        for site in sites
        if site.tower == "" and site.layer is not None and site.point in PACKED_POINTS
    }
    tower, depth = lm.family.towers[""], lm.dims.layers
    entries = [Site("", layer, "resid_pre") for layer in range(depth)]
    last = Site("", depth - 1, "resid_post")
    base = Base(batch, torch.empty(0), torch.empty(0), {}, tower.causal, depth)
    reads = {site: [partial(_keep, base, site)] for site in {*streams, *entries, last}}
    anew = lm.readout.kind != "vectors" and outside.reads_out_anew(lm)
    # nobody waits for the logits of every position
    outer_reads = any(heard for _, heard in lm.taps.listening)
    if not (anew or outer_reads):
        reads[last].append(_stop)
    base.lengths = [] if batch.mask is None else batch.host_lengths.tolist()
    with lm.taps.using(reads=reads), _overhearing(lm, base, entries):
        whole = outside.answers(lm, batch) if anew else lm(batch)
    base.answers = whole if anew else answers(lm, base.values[last], batch)
    base.metric = metric(base.answers, torch.arange(len(batch)))
    base.residual = [base.values[entry] for entry in entries]
    base.width = base.residual[0].shape[1]
    base.lengths = base.lengths or [base.width] * len(batch)
    outer, single = outside.changes(lm), lm.readout.single
    base.reads = lm.readout.positions(batch).tolist() if single else []
    base.shareable = (
        lm.layout.packable and single and not anew and outer is not None and shareable(lm, outer)
    )
    base.shareable = base.shareable and row_independent(lm.model)
    if tower.between and batch.extra:  # what is added between two layers is no part of either
        base.shareable = False
    if base.shareable:
        base.outer = outer or []
        _note_layers(lm, base, entries)
    return base


@contextmanager
def _overhearing(lm: LM, base: Base, entries: Sequence[Site]) -> Iterator[None]:
    """Note the layers' arguments, keys, values and masks as the base run passes."""
    attentions = [lm.layout.attention(entry) for entry in entries] if lm.layout.packable else []
    notes = dict.fromkeys(attentions, partial(_note_attention, base))
    with overheard(lm.model, notes), _calls_noted(lm, base):
        yield


@contextmanager
def _calls_noted(lm: LM, base: Base) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in lm.layout.layers[""]:
            hook = layer.register_forward_pre_hook(partial(_note_call, base), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _note_layers(lm: LM, base: Base, entries: Sequence[Site]) -> None:
    """A pass of its own through the seam, where the base run could not be overheard.

    The values above come from the model's own kernel, as the user's captures do: only then is a
    replacement that changes nothing equal bit for bit.
    """
    if not base.keys:
        base.calls.clear()
        attentions = [lm.layout.attention(entry) for entry in entries]
        notes = dict.fromkeys(attentions, partial(_attend_noting, base))
        with (
            outside.unheard(lm),
            lm.taps.using(),
            _calls_noted(lm, base),
            seam(lm.model, {}, notes),
        ):
            lm(base.batch)
    # not so where a layer's attention is left out
    once = len(base.calls) == len(base.keys) == base.depth
    known: dict[int, Tensor] = {}
    base.shareable = once and all(_cangather(base, layer, known) for layer in range(base.depth))


def _keep(base: Base, site: Site, x: Tensor, run: Run) -> None:
    base.values[site] = x.detach().clone()


def _stop(x: Tensor, run: Run) -> None:
    raise StopForward


def _note_call(base: Base, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    base.calls.append(beside_the_stream(args, kwargs))


def beside_the_stream(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a layer is called with beside the stream; without a cache, to which other rows would be
    appended."""
    given = ("hidden_states", "use_cache", "cache", "layer_past")
    rest = tuple(None if isinstance(x, Cache) else x for x in args[1:])
    return rest, {k: x for k, x in kwargs.items() if k not in given and not isinstance(x, Cache)}


def _note_attention(
    base: Base, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None
) -> None:
    """causal: whether later keys are hidden though there is no mask; None where nobody says."""
    base.keys.append(k)
    base.vals.append(v)
    same = bool(base.masks) and mask is base.masks[-1]  # most models make one for all layers
    if mask is None:
        base.order.append("causal" if causal else "all")
    else:
        base.order.append(base.order[-1] if same else _order(mask, base.lengths))
    base.masks.append(mask)
    ahead = causal is False if mask is None else not same and looks_ahead(mask)
    base.causal = base.causal and not ahead


def _attend_noting(
    base: Base,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    _note_attention(base, k, v, mask, None)
    if len(base.keys) == len(base.calls) == base.depth:
        raise StopForward  # nothing more is asked of this pass
    groups = q.shape[1] // k.shape[1]
    scores = masked(scores_of(q, repeat_heads(k, groups), scaling, cap), mask)
    pattern = softmax_visible(scores, None if sinks is None else sinks.reshape(1, -1, 1, 1))
    return (pattern @ repeat_heads(v, groups)).transpose(1, 2).contiguous()


def _order(mask: Tensor, lengths: Sequence[int]) -> str:
    """What a mask lets real tokens see; those after the last of an example ask nothing."""
    if mask.shape[1] > 1 or mask.shape[-1] != mask.shape[-2]:
        return ""
    seen = mask[:, 0]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    places = torch.arange(mask.shape[-1], device=mask.device)
    ends = torch.tensor(lengths or [len(places)], device=mask.device)
    real = (places < ends[:, None])[:, :, None]
    if bool((seen | ~real).all()):
        return "all"
    causal = places <= places[:, None]
    return "causal" if bool(((seen == causal) | ~real).all()) else ""


def _cangather(base: Base, layer: int, known: dict[int, Tensor]) -> bool:
    """Whether every tensor the layer is called with is one of those `gather` knows how to give to
    single rows, and its attention has one mask for all heads (BEiT adds a bias of relative
    positions to each head's)."""
    mask = base.masks[layer]
    if mask is not None and mask.shape[1] > 1:
        return False
    zero = torch.zeros(1, dtype=torch.long)
    args, kwargs = base.calls[layer]
    try:
        gather((args, kwargs), base, layer, zero, zero, known=known)
    except ValueError:
        return False
    return True


def gather(
    x: Any,
    base: Base,
    layer: int,
    example: Tensor,
    position: Tensor,
    live: int | None = None,
    known: dict[int, Tensor] | None = None,
) -> Any:
    """A layer argument of the base run, for rows at (example, position), or the first `live` of
    them. known: what was gathered for all rows before. Raises ValueError for an unknown shape."""
    given = base, layer, example, position, live, known
    if isinstance(x, dict):
        return {name: gather(value, *given) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(gather(value, *given) for value in x)
    if not isinstance(x, Tensor):
        return x
    mask = base.masks[layer]
    if mask is not None and x.shape == mask.shape and x.data_ptr() == mask.data_ptr():
        return None  # attention of packed rows masks by itself
    rows = None if known is None else known.get(id(x))  # layers are often given the same tensors
    rows = _rows(x, base, example, position) if rows is None else rows
    if known is not None:
        known[id(x)] = rows
    return rows if live is None else rows.narrow(-2 if x.ndim >= 3 else -1, 0, live)


def _rows(x: Tensor, base: Base, example: Tensor, position: Tensor) -> Tensor:
    width, rows = base.width, (1, len(base.batch))
    # rotary cos and sin: (..., example, position, dim)
    if x.ndim >= 3 and x.shape[-2] == width and x.shape[-3] in rows:
        return x[
            ..., example if x.shape[-3] > 1 else torch.zeros_like(example), position, :
        ].unsqueeze(-3)
    if x.ndim == 2 and x.shape[1] == width and x.shape[0] in rows:  # position ids
        return x[example if x.shape[0] > 1 else torch.zeros_like(example), position][None]
    if x.ndim == 1 and x.shape[0] == width:
        return x[position]
    raise ValueError(f"a layer argument of shape {tuple(x.shape)} cannot be given to single rows")
