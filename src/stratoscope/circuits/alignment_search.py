"""Distributed alignment search: the directions at a site that carry a variable, so that to
interchange them between two prompts is to interchange the variable.

Paper: textbook (Geiger et al., "Finding alignments between interpretable causal variables and
distributed neural representations", 2023; the number of directions learnt too: Wu et al.,
"Interpretability at scale: identifying causal mechanisms in Alpaca", 2023)

    h'       = h_base + B B^T (h_source - h_base)       B (dim, rank), orthonormal by construction
    loss     = - log p(answer | base prompt with h' at the site), mean over pairs
    accuracy = share of pairs, not searched with, whose most probable token is the answer

rank=None: B are the first columns of a rotation of the whole space, as many as lie below a boundary
b dim that is learnt with it: column i is interchanged by sigmoid((b dim - i - 1/2) / T), T falling
to 0.1, and b is added to the loss. The answer of a pair is what the base prompt ought to say if the
variable had the source's value.

null: as many random directions; the same search on the model's untrained twin.
Reads as: the variable can be set by these directions and these alone, in prompts like those that
were searched with; beside `whole`, all of the site interchanged, and `unchanged`, nothing. Does not
show that the model computes this variable: a search over enough directions finds an alignment where
there is none (a random network has one if the answer can be read off it), so look at the untrained
twin first; nor that the directions are the only ones.
Cost: one run of the source prompts; a step is a forward and a backward pass of 16 base prompts, on
both models; measure sweeps draws + 3 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from stratoscope.circuits._counterfactuals import Pairs, Where, pairs, plain, site_of
from stratoscope.circuits._interchange import Alignment as Alignment
from stratoscope.circuits._interchange import alignment_of, exchange, kept, search
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.errors import InputError
from stratoscope.maths import resample
from stratoscope.models.fresh import untrained as untrained_twin
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "as many random directions (or units), interchanged at the same site"
_PRICE = 1.0  # of the boundary, as in the authors' code
_COLD = 0.1


class Rotation(nn.Module):
    """`rank` orthonormal columns; of several more than are kept, a boundary says how many."""

    weight: Tensor

    def __init__(self, dim: int, rank: int | None, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed + 1_000_003)  # no draw of the null
        start = torch.linalg.qr(torch.randn(dim, rank or dim, generator=rng)).Q
        self.weight = nn.Parameter(start)
        with torch.random.fork_rng(devices=[]):  # it completes the columns to a square at random
            torch.default_generator.manual_seed(seed)
            orthogonal(self)
        self.boundary = None if rank else nn.Parameter(torch.tensor(0.5))
        self.hot = max(1.0, dim / 8)

    def forward(
        self, base: Float[Tensor, "*rows dim"], source: Float[Tensor, "*rows dim"], along: float
    ) -> Float[Tensor, "*rows dim"]:
        basis = self.weight
        part = (source - base) @ basis
        if self.boundary is not None:
            heat = self.hot * (_COLD / self.hot) ** along
            column = torch.arange(len(basis), device=basis.device) + 0.5
            part = part * torch.sigmoid((self._columns() - column) / heat)
        return base + part @ basis.T

    def price(self) -> Tensor:
        return self.weight.new_zeros(()) if self.boundary is None else self.boundary

    def found(self) -> Float[Tensor, "dim rank"]:
        basis = self.weight.detach().cpu()
        if self.boundary is None:
            return basis.contiguous()
        return basis[:, : max(1, round(float(self._columns().detach())))].contiguous()

    def _columns(self) -> Tensor:
        return self.price().clamp(0, 1) * len(self.weight)


def fit(
    lm: LM,
    inputs: Any,
    *,
    site: str,
    rank: int | None = 1,
    positions: Where = -1,
    steps: int = 200,
    rate: float = 1e-2,
    untrained: bool = True,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Alignment:
    """The directions at a site that carry what the pairs differ in.

    inputs: rows (base, source, answer) or {"base", "source", "answer"}: two prompts, and the one
    token that the base prompt is to say with the source's value. site: one with one vector a token
    (resid_post, mlp.out, attn.out, mlp.act). rank: how many directions; None: that is learnt too.
    positions: which tokens, as many in both; {"base": ..., "source": ...} where they differ.
    untrained: search on the untrained twin too. folder: where it is kept; a search that was killed
    is gone on with by the same call. Raises InputError for pairs, positions or settings that
    cannot be, SiteError for a site without one vector a token, ResultError for a folder with
    another fit.
    """
    at = site_of(lm, site, flat=True)
    dim = lm.layout.sizes(at)[at.axes[2]]
    if steps < 1 or rate <= 0 or (rank is not None and not 1 <= rank <= dim):
        raise InputError(
            f"steps={steps}, rate={rate}, rank={rank}: one step or more, a rate above 0, and 1 to "
            f"{dim} directions."
        )
    settings = {"fit": "circuits.alignment_search", "site": str(at), "rank": rank, "rate": rate}
    settings |= {"positions": plain(positions), "steps": steps, "seed": seed}
    settings |= {"untrained": untrained}
    given = pairs(lm, inputs, at, positions)
    how, price = {"steps": steps, "rate": rate, "seed": seed}, 0.0 if rank else _PRICE

    def make(about: dict[str, Any], work: Path | None) -> Alignment:
        made, null = Rotation(dim, rank, seed), None
        curve = search(lm, given, made, price, **how, folder=work and work / "own")
        if untrained:
            twin = untrained_twin(lm, seed=seed)
            null = Rotation(dim, rank, seed)
            there = pairs(twin, inputs, at, positions)
            search(twin, there, null, price, **how, folder=work and work / "untrained")
        return Alignment(
            site=str(at),
            found=made.found(),
            untrained=None if null is None else null.found(),
            positions=plain(positions),
            curve=curve,
            settings=about,
            seed=seed,
            provenance=lm.provenance,
        )

    return kept(lm, given, settings, folder, make)


def measure(
    lm: LM,
    inputs: Any,
    *,
    alignment: Alignment | str | Path,
    draws: int = 20,
    seed: int = 0,
    foreign: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Interchange accuracy on pairs that were not searched with, beside its nulls.

    inputs: pairs, as `fit` takes them. alignment: what `fit` of this method or of
    `circuits.binary_mask` gave, or its folder. draws, seed: of the random directions (or units).
    foreign: take one of other weights. Returns correct, unchanged, whole (example): 1 where the
    most probable token is the answer, with the part interchanged, with nothing, with all of the
    site; accuracy and accuracy_low, _high (95 %, NaN for fewer than five pairs); null (draw), the
    accuracy of each random part, and null_bound; untrained: the accuracy of the twin's own search
    on the twin, NaN where none was made. Raises InputError as `fit` does, and for an alignment of
    another model.
    """
    made = alignment_of(lm, alignment, foreign=foreign)
    if draws < 1:
        raise InputError(f"draws={draws}: at least 1.")
    site = site_of(lm, made.site, flat=made.found.ndim == 2)
    given = pairs(lm, inputs, site, made.positions)
    size = lm.layout.sizes(site)[site.axes[2]]
    parts = [made.found, *_random(made.found, size, draws, seed)]
    everything = replaced(site, given.values, positions=given.at.tolist())
    cells = [[], [everything], *(exchange(part, given) for part in parts)]
    unchanged, whole, correct, *null = _correct(lm, given, cells, progress)
    twin = float("nan")
    if made.untrained is not None:
        fresh = untrained_twin(lm, seed=made.seed or 0)
        there = pairs(fresh, inputs, site, made.positions)
        twin = float(_correct(fresh, there, [exchange(made.untrained, there)])[0].mean())
    share = resample.interval(correct.numpy())
    accuracies = [float(one.mean()) for one in null]
    return dataset(
        {
            "correct": (("example",), correct),
            "unchanged": (("example",), unchanged),
            "whole": (("example",), whole),
            "accuracy": ((), share.value),
            "accuracy_low": ((), share.low),
            "accuracy_high": ((), share.high),
            "null": (("draw",), accuracies),
            "null_bound": ((), resample.bound(accuracies)),
            "untrained": ((), twin),
        },
        method="circuits.alignment_search",
        provenance=lm.provenance,
        settings={"alignment": dict(made.settings), "rank": made.rank, "draws": draws},
        seed=seed,
        coords=given.coords(lm),
        site=made.site,
        null_kind=NULL,
    )


def edit(lm: LM, request: Alignment | str | Path, *, between: Any, foreign: bool = False) -> Edit:
    """An edit under which base prompts have the source prompts' part: `with edit: lm(bases)`.

    request: a fit, or its folder. between: rows (base, source), or as `fit` takes them, in the
    order in which the base prompts are run. Raises InputError as `measure` does.
    """
    made = alignment_of(lm, request, foreign=foreign)
    site = site_of(lm, made.site, flat=made.found.ndim == 2)
    keys = ("base", "source")
    sides = [[row[k] for k in (keys if isinstance(row, Mapping) else (0, 1))] for row in between]
    rows = [(base, source, 0) for base, source in sides]  # no answer is asked
    given = pairs(lm, rows, site, made.positions)
    kind = "units" if made.found.ndim == 1 else "directions"
    note = f"{made.rank} {kind} interchanged at {made.site}"
    return Edit(lm, exchange(made.found, given), note=note)


def _correct(
    lm: LM, given: Pairs, cells: list[Any], progress: Progress | None = None
) -> Float[Tensor, "cell example"]:
    """1 where the most probable output is the answer."""

    def metric(logits: Tensor, example: Tensor) -> Tensor:
        wanted = given.answer.to(logits.device)[example.to(logits.device)]
        return (logits.argmax(dim=-1) == wanted).to(torch.float32)

    return sweep(lm, given.base, cells, metric, progress=progress).cpu()


def _random(found: Tensor, size: int, draws: int, seed: int) -> list[Tensor]:
    """As many directions, or units, drawn at random."""
    rng = torch.Generator().manual_seed(seed)
    if not found.is_floating_point():
        chosen = (torch.randperm(size, generator=rng)[: len(found)] for _ in range(draws))
        return [units.sort().values for units in chosen]
    return [torch.linalg.qr(torch.randn(found.shape, generator=rng)).Q for _ in range(draws)]
