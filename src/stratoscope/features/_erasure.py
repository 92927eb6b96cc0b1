"""What takes a concept out of a vector: an affine map that can be kept, and the edit that applies
it while the model runs. What `leace` and `inlp` fit is this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.dictionary import flat, width_at
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import add, resolve
from stratoscope.engine.intervention import Intervention
from stratoscope.engine.select import Positions
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, LoadError
from stratoscope.features._texts import parts
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.store import tensors as files
from stratoscope.store.fitted import Fitted

Tokens = Literal["read", "every"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Eraser(Fitted):
    """x -> x - left (right (x - mean)): `right` reads the concept, `left` is what is taken away.

    site: where x stands; an edit applies the map there.
    """

    site: str
    mean: Float[Tensor, " dim"]
    left: Float[Tensor, "dim rank"]
    right: Float[Tensor, "rank dim"]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Vectors without the concept, in the precision that they come in."""
        mean, left, right = (part.to(x) for part in (self.mean, self.left, self.right))
        return x - ((x - mean) @ right.T) @ left.T


class Erasure(Edit):
    """An edit that applies erasers, each at its own site. Nests; on any exit all is put back."""

    def __init__(self, lm: LM, erasers: Sequence[Eraser], positions: Positions = None) -> None:
        told = ", ".join(f"{one.rank} directions at {one.site}" for one in erasers)
        super().__init__(lm, note=f"a concept erased: {told}")
        self.erasers, self.positions = list(erasers), positions
        self._changes: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
        for one in erasers:
            _fits(lm, one)
            [where] = resolve(lm, [add(one.site, 0.0, positions=positions)])
            self._changes.setdefault(where.site, []).append(_change(lm, one, where))

    def __enter__(self) -> Erasure:
        with ExitStack() as opening:
            super().__enter__()
            opening.callback(super().__exit__)
            opening.enter_context(self.lm.taps.using(edits=self._changes))
            self._open.append(opening.pop_all())
        return self

    def save(self, path: str | Path) -> None:
        """Write erasers and all in one safetensors file. Raises LoadError when it cannot be
        written; a file that was there stays then."""
        tensors = {f"{n}/{k}": x for n, e in enumerate(self.erasers) for k, x in e.tensors.items()}
        about = [
            {"site": e.site, "settings": e.settings, "seed": e.seed, "provenance": e.provenance}
            | {"code": e.code}
            for e in self.erasers
        ]
        at = self.positions
        told = {"erasers": about, "positions": at if at is None else np.asarray(at).tolist()}
        try:
            files.write(path, tensors, kind="erasure", about=told)
        except OSError as error:
            raise LoadError(
                f"The erasure could not be written to {path}: {error}. Make room, or give another "
                "path."
            ) from error

    @classmethod
    def load(cls, lm: LM, path: str | Path) -> Erasure:
        """Read what `save` wrote. Raises LoadError for another file, InputError for a model of
        another width."""
        tensors, about = files.read(path, kind="erasure")
        made = []
        for n, rest in enumerate(about["erasers"]):
            own = {k: tensors[f"{n}/{k}"] for k in ("mean", "left", "right")}
            made.append(Eraser(**own, **rest))
        return cls(lm, made, about["positions"])


def erasure(lm: LM, request: Any, positions: Positions) -> Erasure:
    """The edit of one eraser, a folder of one, or several. Raises InputError for none."""
    given = [request] if isinstance(request, (Eraser, str, Path)) else list(request)
    if not given:
        raise InputError("an erasure is of at least one eraser; got an empty list.")
    made = [one if isinstance(one, Eraser) else Eraser.load(one) for one in given]
    return Erasure(lm, made, positions)


@torch.no_grad()
def vectors(
    lm: LM, inputs: Any, labels: Sequence[Any], site: str, tokens: Tokens
) -> tuple[Float[Tensor, "vector dim"], Int[np.ndarray, " vector"], Int[np.ndarray, " vector"]]:
    """What stands at a site, in double on the CPU; of each vector the number of its kind, and that
    of its text.

    labels: a name for each text; or, where every token is read, one for each token of each.
    tokens: "read", the one that the model's answer is read at (the last), or "every" real one.
    """
    if tokens not in ("read", "every"):
        raise InputError(f"tokens={tokens!r}: 'read' the last token of each text, or 'every' one.")
    at, batch = lm.layout.resolve_one(site), lm.batch(inputs)
    width_at(lm, at)
    if len(labels) != len(batch):
        raise InputError(f"{len(labels)} labels for {len(batch)} texts: give one for each.")
    rows: list[Tensor] = []
    for part in [batch] if batch.ids is None else parts(lm, batch):
        if tokens == "read":
            rows += flat(capture(lm, part, at, positions=lm.readout.place(part))[at][:, None])
            continue
        seen, real = flat(capture(lm, part, at)[at]), part.mask
        rows += seen if real is None else [x[own] for x, own in zip(seen, real.to(seen.device))]
    names: list[Any] = []
    for label, row in zip(labels, rows):
        several = isinstance(label, (list, tuple, np.ndarray))
        if several and len(label) != len(row):
            raise InputError(f"{len(label)} labels for a text of {len(row)} tokens that are read.")
        names += list(label) if several else [label] * len(row)
    kinds, number = np.unique(np.asarray(names), return_inverse=True)
    counts = np.bincount(number)
    if len(kinds) < 2 or counts.min() < 2:
        raise InputError(
            f"labels are of two kinds or more, at least two vectors of each; got "
            f"{dict(zip(kinds.tolist(), counts.tolist()))}."
        )
    text = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return torch.cat(rows).double().cpu(), number, text


def probe(
    x: Float[np.ndarray, "vector dim"], kinds: Int[np.ndarray, " vector"], strength: float
) -> Any:
    """scikit-learn's logistic regression; `strength` is the inverse of its penalty."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(x, kinds)


def _fits(lm: LM, one: Eraser) -> None:
    width = width_at(lm, lm.layout.resolve_one(one.site))
    if width != len(one.mean):
        raise InputError(
            f"this eraser is of {len(one.mean)} numbers at `{one.site}`, where {lm.family.name} "
            f"has {width}: fit one to this model."
        )


def _change(lm: LM, one: Eraser, where: Intervention) -> Callable[[Tensor, Run], Tensor]:
    mean, left, right = (x.to(lm.model.device) for x in (one.mean, one.left, one.right))

    def change(x: Tensor, run: Run) -> Tensor:
        if run.step > 0 and where.positions is not None:  # named positions are the prompt's
            return x
        index = where.index(x, run)
        chosen = x if index is None else x[index]
        wide = flat(chosen).float()
        kept = wide - ((wide - mean) @ right.T) @ left.T
        kept = kept.reshape(chosen.shape).to(x.dtype)
        return kept if index is None else torch.index_put(x, index, kept)

    return change
