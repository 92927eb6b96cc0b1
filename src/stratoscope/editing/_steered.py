"""The edit that steers: vectors added at sites, each token's length kept or not; it is refused
before it runs where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import resolve
from stratoscope.engine.intervention import WHERE, Intervention
from stratoscope.errors import InputError, LoadError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site, parse
from stratoscope.store import tensors as files

KIND = "steering edit"


class Steer(Edit):
    """Vectors added inside `with`, as an `Edit`; keep_norm: every token keeps its own length.

    With keep_norm the vectors stand in `held`, and `interventions` is empty: a sweep inside the
    block then runs whole, and does not take it for an addition.
    """

    def __init__(
        self, lm: LM, changes: Sequence[Intervention], *, keep_norm: bool = False, note: str = ""
    ) -> None:
        self.keep_norm = keep_norm
        self.held = resolve(lm, changes)
        super().__init__(lm, () if keep_norm else self.held, note=note)

    def __enter__(self) -> Steer:
        self._refuse_twice()
        with ExitStack() as opening:
            super().__enter__()
            opening.callback(super().__exit__)
            if self.keep_norm:
                edits: dict[Site, list[Any]] = {}
                for change in self.held:
                    edits.setdefault(change.site, []).append(partial(_turned, change))
                opening.enter_context(self.lm.taps.using(edits=edits))
            self._open.append(opening.pop_all())
        return self

    def _refuse_twice(self) -> None:
        """Raise InputError where one of the vectors is being added already."""
        for site, own in [(change.site, change) for change in self.held]:
            for edits, _ in self.lm.taps.listening:
                for active in edits.get(site, ()):
                    made = active.args[0] if isinstance(active, partial) else active
                    other = getattr(made, "__self__", made)
                    if isinstance(other, Intervention) and _same(own, other):
                        raise InputError(
                            f"this vector is being added at `{site}` already ({self.note}): an "
                            "edit applied twice steers twice as far. Leave the first block, or "
                            "make one edit of the strength that is meant."
                        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Raises LoadError when it cannot be written; a file that was
        there stays then."""
        rows = [
            {"site": str(c.site)}
            | {k: _plain(getattr(c, k)) for k in WHERE if getattr(c, k) is not None}
            for c in self.held
        ]
        provenance = {k: self.lm.provenance.get(k) for k in ("model", "weights")}
        about = {"rows": rows, "keep_norm": self.keep_norm, "note": self.note}
        tensors = {f"value/{number}": change.value for number, change in enumerate(self.held)}
        try:
            files.write(path, tensors, kind=KIND, about=about | {"provenance": provenance})
        except OSError as error:
            raise LoadError(
                f"The steering edit could not be written to {path}: {error}. Make room, or give "
                "another path."
            ) from error

    @classmethod
    def load(cls, lm: LM, path: str | Path, *, foreign: bool = False) -> Steer:
        """Read what `save` wrote. foreign: take one made for other weights. Raises LoadError for
        another file, InputError for one made for another model or width."""
        tensors, about = files.read(path, kind=KIND)
        if not foreign:
            refuse_other_model(lm, about["provenance"])
        changes = []
        for number, row in enumerate(about["rows"]):
            site, value = parse(row.pop("site")), tensors[f"value/{number}"]
            if row.get("units") is None:
                value = fitting(lm, site, value, 1.0)
            changes.append(Intervention(site, "add", value, **row))
        return cls(lm, changes, keep_norm=about["keep_norm"], note=about["note"])


def fitting(lm: LM, site: Site, vector: Tensor, strength: float) -> Tensor:
    """strength times a vector. Raises InputError where it is not of the width that the site has,
    or longer than the model's numbers can say."""
    at = lm.layout.resolve_one(site)
    sizes = lm.layout.sizes(at) | {"vocab": lm.dims.vocab}
    shape = tuple(sizes[axis] for axis in at.axes[2:])
    if tuple(vector.shape) != shape:
        raise InputError(
            f"the vector of `{site}` has the shape {tuple(vector.shape)}, and "
            f"{type(lm.model).__name__} has {shape} there: it is of another model. Fit it on this "
            "one."
        )
    added = vector.detach().float() * float(strength)
    # norms are taken of squares in float32
    long = bool(added.isfinite().all()) and not bool(added.square().sum().isfinite())
    if long or not bool(added.to(lm.model.dtype).isfinite().all()):
        raise InputError(
            f"strength {strength:g} at `{site}`: the vector, of norm {float(vector.norm()):.3g}, "
            f"becomes too long for {str(lm.model.dtype).removeprefix('torch.')}, and logits would "
            "be infinite or nothing. Take a smaller strength."
        )
    return added.to(lm.model.device)


def refuse_other_model(lm: LM, provenance: Mapping[str, Any]) -> None:
    """Raise InputError where vectors were made on other weights; nothing is known of some."""
    known = provenance.get("weights")
    here = lm.provenance
    if known is not None and known != here.get("weights"):
        raise InputError(
            f"these vectors were fitted on {provenance.get('model')} ({known}), and this is "
            f"{here.get('model')} ({here.get('weights')}): fit them on this model, or say "
            "foreign=True to take them over."
        )


def _turned(change: Intervention, x: Tensor, run: Run) -> Tensor:
    """The change made, every vector as long as before; nothing happens to it where there is no
    change."""
    y = change.apply(x, run)
    before, after = (v.float().norm(dim=-1, keepdim=True) for v in (x, y))
    return y * (before / after.clamp_min(torch.finfo(torch.float32).tiny)).to(y.dtype)


def _same(one: Intervention, other: Intervention) -> bool:
    alike = one.operation == other.operation and one.value.shape == other.value.shape
    return alike and torch.equal(one.value, other.value.to(one.value))


def _plain(option: Any) -> Any:
    if isinstance(option, Tensor):
        return option.tolist()
    return list(option) if isinstance(option, Sequence) else option
