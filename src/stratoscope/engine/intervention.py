"""An intervention as a value: one change at one site, and where in it the change is made.

`engine.intervene` makes these and applies them to a running model; `apply` is the change itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.select import Positions, key_axis, position_index, run_at, with_gone
from stratoscope.errors import InputError
from stratoscope.models.provenance import described_value
from stratoscope.models.run import Run
from stratoscope.models.sites import Site

WHERE = ("positions", "units", "keys", "examples", "steps")  # what narrows an intervention
UNIT_AXES = ("head", "kv_head", "neuron", "channel", "dim", "expert", "vocab")


def largest(x: Float[Tensor, "... unit"], k: int) -> Float[Tensor, "... unit"]:
    """The k largest in size of each row, 0 elsewhere; a tie is broken, so that never more than k
    are kept."""
    chosen = x.abs().topk(min(k, x.shape[-1]), dim=-1).indices
    return torch.zeros_like(x).scatter(-1, chosen, x.gather(-1, chosen))


# what is selected, and the intervention's value -> what takes its place
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "replace": lambda x, value: value.to(x).expand_as(x),
    "add": lambda x, value: x + value.to(x),
    "scale": lambda x, value: x * value.to(x),
    "clamp": lambda x, value: x.clamp(float(value[0]), float(value[1])),
    "project_out": lambda x, value: x - (x @ value.to(x).T) @ value.to(x),
    "largest": lambda x, value: largest(x, int(value)),
    "permute": lambda x, value: x.gather(-1, value.to(x.device).expand_as(x)),
}
# of these the value has the axes of what is selected, or broadcasts against them
ALIKE = ("replace", "add", "scale", "permute")


@dataclass(frozen=True, eq=False)  # tensors do not compare
class Intervention:
    """One change at one site (or at all layers, with `*`).

    value: broadcasts against the selection, whose axes are the site's, narrowed: e.g. (example,
    position, head, head_dim). Of clamp it is (low, high), of project_out a basis (direction, dim),
    of largest k; of permute which place of the last axis stands at each.
    """

    site: Site
    operation: Literal["replace", "add", "scale", "clamp", "project_out", "largest", "permute"]
    value: Tensor
    positions: Positions = None
    units: Sequence[int] | None = None
    keys: Positions = None
    examples: Sequence[int] | None = None
    steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise InputError(
                f"operation {self.operation!r} at `{self.site}`: choose one of "
                f"{', '.join(OPERATIONS)}."
            )

    def describe(self) -> dict[str, Any]:
        """What provenance tells of it, beside the site."""
        where = {name: getattr(self, name) for name in WHERE if getattr(self, name) is not None}
        described = {
            name: x.tolist() if hasattr(x, "tolist") else _lists(x) for name, x in where.items()
        }
        return {"operation": self.operation, "value": described_value(self.value), **described}

    def apply(self, x: Tensor, run: Run) -> Tensor:
        """The site's tensor with the change made; the same tensor when this step or position is not
        concerned."""
        axis = key_axis(self.site)
        queries = self.positions is not None and (axis is None or "query" in self.site.axes)
        if (self.steps is not None and run.step not in self.steps) or (run.step > 0 and queries):
            return x
        named = self.positions if self.keys is None else self.keys
        gone = 0
        if axis is not None and named is not None:
            gone = run_at(self.site, run, self.site.axes[axis]).gone(x.shape[axis])
        # make place for what a sliding window's cache has let go, so that keys count from 0
        if gone:
            changed = self._change(with_gone(x, axis, gone, 0.0), run)
            return changed.narrow(axis, gone, x.shape[axis])
        return self._change(x, run)

    def _change(self, x: Tensor, run: Run) -> Tensor:
        index = self.index(x, run)
        chosen = x if index is None else x[index]
        value = self.value
        if self.operation in ALIKE:
            # one for each example: of all its beams
            if run.copies > 1 and value.ndim == chosen.ndim and len(value) > 1:
                value = value.repeat_interleave(run.copies, dim=0)
            self._refuse_misfit(value, chosen)
        changed = OPERATIONS[self.operation](chosen, value)
        return changed if index is None else torch.index_put(x, index, changed.to(x.dtype))

    def _refuse_misfit(self, value: Tensor, chosen: Tensor) -> None:
        pairs = zip(reversed(value.shape), reversed(chosen.shape))
        whole = self.operation != "permute" or value.shape[-1] == chosen.shape[-1]
        if (
            not whole
            or value.ndim > chosen.ndim
            or any(own not in (1, there) for own, there in pairs)
        ):
            raise InputError(
                f"a value of shape {tuple(value.shape)} does not fit what is selected at "
                f"`{self.site}`, of shape "
                f"{tuple(chosen.shape)} ({', '.join(self.site.axes)}; a single position keeps its "
                "axis)."
            )

    def index(self, x: Tensor, run: Run) -> tuple[Tensor, ...] | None:
        """Index tensors, one for each axis up to the last narrowed one, or None for everything."""
        chosen: dict[int, Tensor] = {}
        rows = self._rows(len(x), run)
        for axis, word in enumerate(self.site.axes):
            if word == "example" and self.examples is not None:
                chosen[axis] = rows[:, None]
            elif (named := self._named(word)) is not None:
                there, size = run_at(self.site, run, word), x.shape[axis]
                chosen[axis] = position_index(named, there, len(x), size, rows.tolist())[rows]
            elif word in UNIT_AXES and self.units is not None:
                chosen[axis] = units_at(self.units, x.shape[axis], word, self.site)[None]
        if not chosen:
            return None
        index = []
        for axis in range(max(chosen) + 1):
            picked = chosen.get(axis, torch.arange(x.shape[axis])[None] if axis else rows[:, None])
            shape = [1] * (max(chosen) + 1)
            shape[0] = picked.shape[0]
            shape[axis] = picked.shape[0] if axis == 0 else picked.shape[1]
            index.append(picked.reshape(shape).to(x.device))
        return tuple(index)

    def _named(self, word: str) -> Positions:
        """The positions named along an axis."""
        own = {"position": self.positions, "query": self.positions, "key": self.keys}
        return own.get(word)

    def _rows(self, count: int, run: Run) -> Tensor:
        """The rows of the named examples (all beams of each); of all without names."""
        if self.examples is None:
            return torch.arange(count)
        there = count // run.copies
        if not all(0 <= example < there for example in self.examples):
            raise InputError(
                f"examples {list(self.examples)}: this batch has {there}, numbered from 0."
            )
        first = torch.tensor(list(self.examples), dtype=torch.long) * run.copies
        return (first[:, None] + torch.arange(run.copies)).flatten()


def units_at(units: Sequence[int], size: int, word: str, site: Site) -> Tensor:
    """The units as numbers from 0. Raises InputError for one that the site does not have."""
    index = torch.as_tensor(list(units))
    if index.numel() == 0 or int(index.max()) >= size or int(index.min()) < -size:
        raise InputError(
            f"{word} {list(units)} at `{site}`: this site has {size}, numbered 0 to {size - 1}."
        )
    return index % size


def _lists(x: Any) -> Any:
    return [_lists(one) for one in x] if isinstance(x, Sequence) else int(x)
