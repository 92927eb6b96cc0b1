"""Interchanging a part of what stands at a site between two prompts: the part that was found, and
the search for it. `alignment_search` searches for directions, `binary_mask` for units.

    h' = h_base + B B^T (h_source - h_base)     B (dim, rank): orthonormal directions, or units
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.circuits._counterfactuals import Pairs, Values, site_of, some_of
from stratoscope.engine import outside
from stratoscope.engine.gradients import frozen
from stratoscope.engine.intervene import add, project_out, replaced
from stratoscope.engine.intervention import Intervention
from stratoscope.engine.progress import shown
from stratoscope.engine.trace import trace
from stratoscope.engine.train import Recipe, epoch_rows, train
from stratoscope.errors import InputError, ResultError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.store.fitted import Fitted

BATCH = 16  # pairs of a step


@dataclass(frozen=True, eq=False, kw_only=True)
class Alignment(Fitted):
    """The part of a site that carries a variable: `found` (dim, rank), orthonormal columns, or the
    numbers of units (rank,). untrained: the same search on the model's untrained twin; None where
    it was not asked. positions: the tokens of the base and of the source prompts. curve: [step,
    loss] of the search."""

    site: str
    found: Tensor
    untrained: Tensor | None = None
    positions: Any = -1
    curve: Any = ()

    @property
    def rank(self) -> int:
        return self.found.shape[-1]


def exchange(found: Tensor, pairs: Pairs) -> list[Intervention]:
    """The interchange of one part, as interventions on the base prompts."""
    where = {"positions": pairs.at.tolist()}
    if not found.shape[-1]:
        return []
    if not found.is_floating_point():
        units = found.tolist()
        return [replaced(pairs.site, pairs.values[:, :, units], units=units, **where)]
    basis = found.to(pairs.values)
    moved = (pairs.values @ basis) @ basis.T
    return [project_out(pairs.site, found.T, **where), add(pairs.site, moved, **where)]


def search(lm: LM, given: Pairs, learner: nn.Module, price: float, **how: Any) -> list[Any]:
    """Learn the part, so that base prompts say the answers; the curve of the loss.

    learner(base, source, along): what takes the base's place, `along` (0 to 1) being how far the
    search is; its `price()` times `price` is added to the loss. how: steps, rate, seed, folder.
    """
    learner.to(lm.model.device)
    steps, size = how["steps"], min(BATCH, len(given))

    def loss(_: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = epoch_rows(len(given), size, step, how["seed"])
        part = some_of(lm, given.base, rows)
        at, source = given.at[rows], given.values[rows]
        change = partial(learner, along=step / max(1, steps - 1))
        said = _answers(lm, part, given.site, at, source, change)
        missed = nn.functional.cross_entropy(said.float(), given.answer[rows].to(said.device))
        return missed + price * learner.price() if price else missed

    recipe = Recipe(
        learner, loss, None, None, steps, how["rate"], warmup=max(1, steps // 20), decay=0.0,
        betas=(0.9, 0.999), clip=None, training=False,
    )  # fmt: skip
    with frozen(lm), shown("searching an alignment") as progress:
        try:
            return train(recipe, how["folder"], seed=how["seed"], progress=progress).curve
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {how['rate']}.") from error


def _answers(
    lm: LM, batch: Batch, site: Site, at: Tensor, source: Values, change: Any
) -> Float[Tensor, "example output"]:
    """What the model says once `change(base, source)` stands at the site, with gradients."""
    index = (torch.arange(len(at))[:, None].to(source.device), at.to(source.device))

    def put(x: Tensor, run: Run) -> Tensor:
        return torch.index_put(x, index, change(x[index].float(), source).to(x.dtype))

    last = Site("", lm.dims.layers - 1, "resid_post")
    with lm.taps.using(edits={site: [put]}), trace(lm, last, grad=True) as seen:
        if outside.reads_out_anew(lm):
            return outside.answers(lm, batch)
        lm(batch)
        return lm.readout.of(seen[last], batch)


def kept(
    lm: LM, given: Pairs, settings: dict[str, Any], folder: str | Path | None, make: Any
) -> Alignment:
    """`make(work)`, in a folder the very fit that stands there already. Raises ResultError for
    another fit."""
    model = [lm.provenance.get(key) for key in ("weights", "dtype", "changes")]
    rows = [given.base.text[0].tolist(), given.source.text[0].tolist(), given.answer.tolist()]
    told = repr((settings, model, rows, given.at.tolist()))
    about = settings | {"pairs": len(given), "of": hashlib.sha256(told.encode()).hexdigest()[:12]}
    if folder is None:
        return make(about, None)
    place = Path(folder)
    if (place / "fitted.json").is_file():
        there = Alignment.load(place)
        if dict(there.settings) != about:
            raise ResultError(
                f"{place} holds another alignment (other pairs, settings or weights): give another "
                "folder, or delete this one."
            )
        return there
    work = place / f".making-{about['of']}"
    made = make(about, work)
    made.save(place)
    shutil.rmtree(work, ignore_errors=True)
    return made


def alignment_of(lm: LM, given: Alignment | str | Path, *, foreign: bool = False) -> Alignment:
    """A fit, or that of a folder. Raises InputError for one of other weights unless `foreign`."""
    made = given if isinstance(given, Alignment) else Alignment.load(given)
    known, here = made.provenance.get("weights"), lm.provenance
    if known is not None and known != here.get("weights") and not foreign:
        raise InputError(
            f"this alignment was searched on {made.provenance.get('model')} ({known}), and this is "
            f"{here.get('model')} ({here.get('weights')}): search one on this model, or say "
            "foreign=True to take it over."
        )
    width = lm.layout.sizes(site_of(lm, made.site, flat=made.found.ndim == 2))
    axis = lm.layout.resolve_one(made.site).axes[2]
    if made.found.ndim == 2 and made.found.shape[0] != width[axis]:
        raise InputError(
            f"this alignment is of {made.found.shape[0]} numbers at `{made.site}`, where "
            f"{lm.family.name} has {width[axis]}: search one on this model."
        )
    return made
