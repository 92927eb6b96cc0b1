"""Float series (sound, time series, spectra): read into a batch, whose positions are what the model
makes of them: frames, or patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models import beside
from stratoscope.models.batch import Batch

if TYPE_CHECKING:
    from stratoscope.models.lm import LM


def read(lm: LM, inputs: Any, tower: str = "") -> Batch:
    """The series under the name by which the model's forward takes them, as a mapping (a
    processor's) or alone: a tensor (example, time, ...), or several of unequal length.

    Raises InputError for what is no series of numbers, and for unequal lengths where padding would
    reach what is beside it.
    """
    table, config = lm.family.towers[tower], lm.layout.config(tower)
    given = dict(inputs) if isinstance(inputs, Mapping) else {table.takes: inputs}
    if given.get(table.takes) is None:
        raise InputError(
            f"this model takes `{table.takes}`: give series of numbers, or the mapping that its "
            f"processor makes; got {', '.join(map(repr, given)) or 'nothing'}."
        )
    own = given.pop(table.mask, given.pop("attention_mask", None))
    series, mask = _padded(table.takes, given.pop(table.takes), own)
    given_inputs = {table.takes: series, **beside.tensors(given)}
    copies = getattr(config, table.rows) if table.rows else 1
    if not table.lengths:  # every position is real
        return Batch(None, None, given_inputs, signal=table.takes, copies=copies)
    lengths = torch.full((len(series),), series.shape[1])
    if mask is not None:
        given_inputs["attention_mask"], lengths = mask, mask.sum(dim=1)
    if table.alone and len(set(lengths.tolist())) > 1:
        raise InputError(
            f"series of {lengths.tolist()} steps in one batch: in this {lm.family.name} padding "
            "reaches the steps beside it (a norm over all of them, or several convolutions), so "
            "that none would be what it is alone. Give those of one length at a time."
        )
    many = getattr(lm.model, table.lengths)
    there, width = many(lengths), int(many(torch.tensor([series.shape[1]])))
    if int(there.min()) < 1:
        raise InputError(
            f"a series of {int(lengths.min())} steps is too short for one position of this model."
        )
    real = torch.arange(width) < there[:, None]
    names = tuple(tuple(f"<{place}>" for place in range(n)) for n in there.tolist())
    return Batch(None, real, given_inputs, names, signal=table.takes, copies=copies)


def _padded(name: str, series: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """Series as one tensor, with zeros after the shorter ones, and where they are real."""
    several = isinstance(series, Sequence) and len(series) > 0 and hasattr(series[0], "__len__")
    if several and not isinstance(series, str):
        rows = [_floats(name, x) for x in series]
        lengths = torch.tensor([len(row) for row in rows])
        series = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if mask is None and len(set(lengths.tolist())) > 1:
            return series, (torch.arange(series.shape[1]) < lengths[:, None]).long()
    table = _floats(name, series)
    table = table[None] if table.ndim == 1 else table
    if mask is None:
        return table, None
    mask = torch.as_tensor(mask).long().cpu()
    rises = mask.shape != table.shape[:2] or bool((mask.diff(dim=1) > 0).any())
    if rises or not bool(mask[:, 0].all()):
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)} beside `{name}` {tuple(table.shape)}: "
            "give one 0 or 1 for each step, padding at the end."
        )
    return table, mask


def _floats(name: str, x: Any) -> Tensor:
    try:
        values = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, dtype=torch.long)
    if not values.is_floating_point() or not values.numel() or not bool(values.isfinite().all()):
        received = f"{type(x).__name__} {x!r:.60}"
        raise InputError(f"`{name}` are series of finite floats; got {received}.")
    return values
