"""The linear memory that an MLP writes by: its place in a model, the keys that ask it, and
what these are on average over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.engine.edit import Edit
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models import weights
from stratoscope.models.lm import LM
from stratoscope.models.run import Each
from stratoscope.models.sites import Site
from stratoscope.store.fitted import Fitted

_TOGETHER = 64  # prompts that run at the same time


@dataclass(frozen=True, eq=False)
class Place:
    """The projection by which one layer's MLP writes.

    site: where its keys stand (what the projection reads). name: of its weight, among the model's
    parameters. alone: whether what it writes is added to the stream as it is.
    """

    layer: int
    site: str
    name: str
    module: nn.Module
    alone: bool

    @property
    def weight(self) -> Float[Tensor, "dim neuron"]:
        return weights.matrix(self.module).detach()

    def write(self, key: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows dim"]:
        """What it writes for keys, in their precision."""
        added = weights.bias(self.module)
        return key @ self.weight.to(key).T + (0 if added is None else added.detach().to(key))

    def stored(self, change: Float[Tensor, "dim neuron"]) -> Tensor:
        """A change of the matrix as the model holds it, in float32."""
        return (change.T if isinstance(self.module, Conv1D) else change).float().contiguous()


def place(lm: LM, layer: int) -> Place:
    """Where a layer's MLP writes. Raises InputError for a layer that is not there, or whose weight
    cannot be changed; SiteError where what the MLP writes is no linear map of one key."""
    if not 0 <= layer < lm.dims.layers:
        raise InputError(
            f"layer {layer}: {type(lm.model).__name__} has {lm.dims.layers}, numbered 0 to "
            f"{lm.dims.layers - 1}."
        )
    site, key = Site("", layer, "mlp.out"), Site("", layer, "mlp.act")
    if lm.layout.lack(site) or lm.layout.lack(key) or not lm.layout.write(site):
        raise SiteError(
            f"what the MLP of layer {layer} writes on {lm.family.name} is no linear map of one "
            "vector (a mixture of experts has one for each expert, mixed by the router), so there "
            "is no key and no closed form. Take a layer with a plain MLP, or train: "
            "editing.fine_tune."
        )
    writers = lm.layout.writers(site)
    module = writers[0]
    own = getattr(module, "weight", None)
    names = [name for name, held in lm.model.named_parameters() if held is own]
    if not weights.is_plain(module) or not names:
        raise InputError(
            f"what the MLP of layer {layer} writes by is {type(module).__name__}, which holds no "
            "plain floating-point matrix (it is quantised, or has an adapter): load the model "
            "unquantised, or merge the adapter, and edit that."
        )
    holders = [name for name, m in lm.model.named_modules() if getattr(m, "weight", None) is own]
    if len(holders) > 1:
        raise SiteError(
            f"the weight of layer {layer} is that of {', '.join(holders[:4])} at once: a change of "
            "it is no change of one layer."
        )
    alone = len(writers) == 1 and lm.layout.locate(site)[1].scale is None
    alone = alone and lm.layout.tower(site).residual != "post-norm"
    return Place(layer, str(key), names[0], module, alone)


@torch.no_grad()
def standing(
    lm: LM, sites: Sequence[str], rows: Sequence[list[int]], ends: Sequence[int]
) -> list[Float[Tensor, "row unit"]]:
    """What stands at each site at one position of each row, in float64."""
    found: list[list[Tensor]] = [[] for _ in sites]
    for begin in range(0, len(rows), _TOGETHER):
        part = slice(begin, begin + _TOGETHER)
        batch = lm.batch([list(row) for row in rows[part]])
        seen = capture(lm, batch, *sites, positions=Each(ends[part]))
        for kept, site in zip(found, sites):
            kept.append(seen[site].double())
    return [torch.cat(pieces) for pieces in found]


@dataclass(frozen=True, eq=False, kw_only=True)
class Moments(Fitted):
    """E[k k^T] over the tokens of a corpus, uncentred, (neuron, neuron) in float64, by the site at
    which keys k stand. tokens: of how many it is the mean."""

    moments: dict[str, Tensor]
    tokens: int

    def at(self, place: Place, ridge: float = 0.0) -> Float[Tensor, "neuron neuron"]:
        """That of one layer, with `ridge` times its mean diagonal added to the diagonal, where the
        layer's weight is. Raises InputError for a layer that it lacks, or of another width."""
        if not 0 <= ridge < float("inf"):
            raise InputError(f"ridge={ridge}: a share of the keys' mean square, 0 or more.")
        held = self.moments.get(place.site)
        if held is None:
            raise InputError(
                f"this covariance is of {', '.join(self.moments)}, not of `{place.site}`: fit it "
                f"with layers={place.layer}."
            )
        width = place.weight.shape[1]
        if held.shape != (width, width):
            raise InputError(
                f"the covariance at `{place.site}` is {tuple(held.shape)}, and the keys there have "
                f"{width} dimensions: it is of another model. Fit it on this one."
            )
        held = held.to(place.weight.device, torch.float64)
        added = ridge * held.diagonal().mean()
        return held + added * torch.eye(width, dtype=held.dtype, device=held.device)


def moments(lm: LM, given: Moments | str | Path) -> Moments:
    """A covariance, or that of a folder. Raises InputError for one of other weights (inside an open
    edit this is not asked: there the model as it was is meant), LoadError for another folder."""
    held = given if isinstance(given, Moments) else Moments.load(given)
    known, here = held.provenance.get("weights"), lm.provenance
    if known is not None and not lm.taps.declared and known != here["weights"]:
        raise InputError(
            f"this covariance was fitted on {held.provenance.get('model')} ({known}), and this is "
            f"{here['model']} ({here['weights']}): fit it on this model."
        )
    return held


def solved(
    moment: Float[Tensor, "neuron neuron"], right: Float[Tensor, "neuron fact"]
) -> Float[Tensor, "neuron fact"]:
    """moment^-1 right, by Cholesky, every neuron in units of its own root mean square.

    Raises InputError where the moment has not full rank.
    """
    scale = moment.diagonal().clamp_min(0).sqrt()
    unit = torch.where(scale > 0, 1 / scale, 0.0)
    even = moment * unit[:, None] * unit
    factor, failed = torch.linalg.cholesky_ex(even)
    least = len(even) * torch.finfo(even.dtype).eps
    if int(failed) or not bool((factor.diagonal().square() > least).all()):
        rank = int(torch.linalg.matrix_rank(even, hermitian=True))
        raise InputError(
            f"the covariance of keys has rank {rank}, and {len(even)} are needed to solve for one "
            "write: the corpus has too few tokens, or neurons that never fire. Fit it on more text "
            f"(several times {len(even)} tokens), or give ridge=0.01, which adds that share of the "
            "keys' mean square in every direction."
        )
    return unit[:, None] * torch.cholesky_solve(unit[:, None] * right, factor)


class FactEdit(Edit):
    """An edit that writes facts into weights. It is refused where it is open already: written
    twice, a fact is written twice as far."""

    def __enter__(self) -> FactEdit:
        if any(told.get("edit") == self.note for _, told in self.lm.taps.declared):
            raise InputError(
                f"this edit is open already ({self.note}): applied twice, it writes twice as far. "
                "Leave the first block."
            )
        super().__enter__()
        return self
