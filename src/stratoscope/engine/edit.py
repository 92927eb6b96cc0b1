"""An edit: a change to a model as a value, applied inside a `with` block and taken back exactly.

It joins changes of weights and changes at sites. It can be saved (safetensors and JSON in one file)
and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stratoscope.engine.intervene import intervene, resolve
from stratoscope.engine.intervention import WHERE, Intervention
from stratoscope.errors import InputError, LoadError
from stratoscope.models.lm import LM
from stratoscope.models.sites import parse
from stratoscope.store import tensors as files


@dataclass
class Edit:
    """Weight deltas by parameter name, and interventions; `with edit:` makes them, leaving the
    block undoes them.

    A parameter's own storage is put aside, not written to, so weights are bit-identical afterwards;
    of several edits each can be left first, and the others stay.
    """

    lm: LM
    interventions: Sequence[Intervention] = ()
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        self.interventions = tuple(resolve(self.lm, self.interventions))
        self._open: list[ExitStack] = []
        parameters = dict(self.lm.model.named_parameters())
        for name, delta in self.deltas.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                actual = (
                    tuple(parameters[name].shape) if name in parameters else "no such parameter"
                )
                raise InputError(
                    f"delta for `{name}` has shape {tuple(delta.shape)}; the model has {actual}."
                )

    def __enter__(self) -> Edit:
        with ExitStack() as opening:
            parameters = dict(self.lm.model.named_parameters())
            for name, delta in self.deltas.items():
                opening.callback(_hold(parameters[name], delta))
            if self.deltas or self.note:
                names = (
                    list(self.deltas) if len(self.deltas) <= 8 else f"{len(self.deltas)} parameters"
                )
                description = {"edit": self.note or "weights"} | (
                    {"weights": names} if self.deltas else {}
                )
                opening.enter_context(self.lm.taps.declare(**description))
            opening.enter_context(intervene(self.lm, *self.interventions))
            self._open.append(opening.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; what is not a tensor stands in its JSON header.

        Raises LoadError when it cannot be written; a file that was there stays then.
        """
        tensors = {f"delta/{name}": delta for name, delta in self.deltas.items()}
        table = []
        for number, change in enumerate(self.interventions):
            tensors[f"value/{number}"] = change.value
            where = {k: _plain(getattr(change, k)) for k in WHERE if getattr(change, k) is not None}
            table.append({"site": str(change.site), "operation": change.operation, **where})
        try:
            files.write(
                path, tensors, kind="edit", about={"interventions": table, "note": self.note}
            )
        except OSError as error:
            raise LoadError(
                f"The edit could not be written to {path}: {error}. Make room, or give another "
                "path."
            ) from error

    @classmethod
    def load(cls, lm: LM, path: str | Path) -> Edit:
        """Read what `save` wrote, for a model of the same shape.

        Raises LoadError for a file that is no edit, is damaged, or of a newer stratoscope.
        """
        tensors, about = files.read(path, kind="edit")
        changes = [
            Intervention(
                parse(row.pop("site")), row.pop("operation"), tensors[f"value/{number}"], **row
            )
            for number, row in enumerate(about["interventions"])
        ]
        deltas = {
            name.removeprefix("delta/"): x
            for name, x in tensors.items()
            if name.startswith("delta/")
        }
        return cls(lm, changes, deltas, about["note"])


@dataclass
class _Held:
    """A parameter while edits are open: it, its own storage, and what each edit adds, in the order
    in which they came."""

    parameter: Tensor
    own: Tensor
    deltas: dict[object, Tensor] = field(default_factory=dict)


# by the parameter's id; an entry lives as long as an edit of it is open
_held: dict[int, _Held] = {}


@torch.no_grad()
def _hold(parameter: Tensor, delta: Tensor) -> Callable[[], None]:
    """Add a delta to a parameter; calling what is returned takes it away again."""
    held, key = _held.setdefault(id(parameter), _Held(parameter, parameter.data)), object()
    held.deltas[key] = delta
    parameter.data = parameter.data + delta.to(parameter)
    return partial(_let_go, held, key)


@torch.no_grad()
def _let_go(held: _Held, key: object) -> None:
    parameter = held.parameter
    del held.deltas[key]
    value = held.own.to(parameter)  # the very storage, unless the model was moved meanwhile
    for delta in held.deltas.values():
        value = value + delta.to(parameter)
    parameter.data = value
    if not held.deltas:
        del _held[id(parameter)]


def _plain(option: object) -> object:
    if isinstance(option, Tensor):
        return option.tolist()
    return list(option) if isinstance(option, Sequence) else option
