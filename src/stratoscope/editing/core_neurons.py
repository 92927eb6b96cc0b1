"""Core neurons: the few neurons of each MLP that a prompt uses most are found while it is read, and
the model goes on with these alone, their weights cut out.

Paper: coreinfer

    counted[token, neuron] = a > 0 and a is among the largest `token_share` of the token's positive
                               a = mlp.act
    counts[neuron]         = tokens of the prompt at which the neuron is counted
    core                   = the `keep` of a layer's neurons with the largest counts
    mlp.out                = W_down[:, core] (act(W_gate[core] x) * (W_up[core] x))   while decoding

Of equal counts the neuron with the larger sum goes first (ours: a short prompt has many). The
authors' code counts as many neurons at every token as its prompt has positive ones on average;
here, as in their text, each token has its own. Gated neurons are signed: `sign="size"` counts by
|a|. The first layers stay whole (theirs: 6 of 32), and so does all that is read before a first new
token.

Reads as: whether a prompt needs the same neurons from its first token to its last, and how much
sooner a token comes without the others (`editing.speed`). Does not show what core neurons are for,
and the core of any text is like that of another: compare with the core of a general corpus.
Cost: one more copy of the kept rows of each MLP, made anew for each prompt.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.editing._cut import Find, Mlp
from stratoscope.editing.drop_modules import _put
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import scaled
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.results import dataset

SIGNS = ("positive", "size")


def counted(
    size: Float[Tensor, "... neuron"], token_share: float = 0.2
) -> Bool[Tensor, "... neuron"]:
    """Which neurons are among the largest `token_share` of those above 0; at least one of them."""
    few = (token_share * (size > 0).sum(dim=-1, keepdim=True)).ceil().long().clamp_min(1)
    least = size.topk(int(few.max()), dim=-1).values.gather(-1, few - 1)
    return (size >= least) & (size > 0)


def most(
    counts: Float[Tensor, "... neuron"],
    keep: float,
    total: Float[Tensor, "... neuron"] | None = None,
) -> Bool[Tensor, "... neuron"]:
    """The share `keep` with the largest counts, at least one; of equal ones that of larger total,
    then the earlier."""
    order = torch.zeros_like(counts) if total is None else total
    order = order.argsort(dim=-1, descending=True, stable=True)
    again = counts.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    best = order.gather(-1, again)[..., : max(1, round(keep * counts.shape[-1]))]
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, best, True)


def overlap(core: Bool[np.ndarray, "example layer neuron"]) -> Float[np.ndarray, "example other"]:
    """Share of the core neurons of one example that another has too, over all layers."""
    flat = np.asarray(core).reshape(len(core), -1).astype(np.float32)
    return flat @ flat.T / flat.sum(axis=1, keepdims=True)


def _tally(
    act: Float[Tensor, "example position neuron"],
    real: Bool[Tensor, "example position"] | None,
    token_share: float,
    sign: str,
) -> tuple[Float[Tensor, "example neuron"], Float[Tensor, "example neuron"]]:
    """Counts of each example's real tokens, and the sum of what is counted by."""
    size = act.float().abs() if sign == "size" else act.float()
    there = torch.ones_like(size[..., :1]) if real is None else real[..., None].to(size)
    return (counted(size, token_share) * there).sum(dim=1), (size * there).sum(dim=1)


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, token_share: float = 0.2, keep: float = 0.4, sign: str = "positive"
) -> xr.Dataset:
    """core, whether a neuron is one of the prompt's core, and counts, at how many of its tokens it
    was counted: (example, layer, neuron).

    For the core of many texts together: `most(counts.sum("example"), keep)`. Raises InputError for
    shares outside 0 to 1 or another sign, SiteError for a mixture of experts.
    """
    _refuse(token_share, keep, sign)
    batch = lm.batch(inputs)
    seen = capture(lm, batch, "layers.*.mlp.act")
    seen.refuse_ragged("layers.*.mlp.act")
    tallies = [_tally(seen[site], batch.mask, token_share, sign) for site in seen.sites]
    axes = ("example", "layer", "neuron")
    return dataset(
        {
            "core": (axes, torch.stack([most(n, keep, total) for n, total in tallies], dim=1)),
            "counts": (axes, torch.stack([n for n, _ in tallies], dim=1)),
        },
        method="editing.core_neurons",
        provenance=lm.provenance,
        settings={"token_share": token_share, "keep": keep, "sign": sign},
        coords={"layer": list(range(lm.dims.layers))}
        | ({"example_text": batch.coords()["example_text"]} if batch.tokens else {}),
        site="layers.*.mlp.act",
    )


@dataclass
class Core(Edit):
    """MLPs cut down to core neurons: `find` the prompt's own, or those that the interventions, one
    mask for each layer, leave. Nests; everything is put back on any exit."""

    find: Find | None = None
    layers: tuple[int, ...] = ()

    def __enter__(self) -> Core:
        sites = self.lm.layout.resolve([f"layers.{layer}.mlp.act" for layer in self.layers])
        masks = [(change.site, change.value[None] != 0) for change in self.interventions]
        known = [(site, None) for site in sites] if self.find else masks
        self.mlps = [Mlp(self.lm, site, core, self.find) for site, core in known]
        with ExitStack() as opening:
            opening.enter_context(self.lm.taps.declare(edit=self.note or "core neurons"))
            changes = {mlp.site: [mlp.change] for mlp in self.mlps}
            opening.enter_context(self.lm.taps.using(edits=changes))
            for mlp in self.mlps:
                _put(opening, mlp.module, "forward", mlp.forward)
            self._open.append(opening.pop_all())
        return self

    @property
    def saving(self) -> float:
        """Share of all MLPs' weights that the last forward pass did without: 0 where it was
        masked."""
        return sum(mlp.saved for mlp in self.mlps) / self.lm.dims.layers

    def save(self, path: str | Path) -> None:
        """As every edit. Raises InputError where each prompt has its own core, found as it is
        read."""
        if self.find:
            raise InputError(
                "each prompt's own core is found as it is read, so there is nothing to save: give "
                "a core, such as `measure(lm, prompt).core[0]`, instead of a share."
            )
        super().save(path)


def edit(
    lm: LM,
    request: Any = 0.4,
    *,
    token_share: float = 0.2,
    sign: str = "positive",
    from_layer: int | None = None,
) -> Core:
    """An edit that goes on with core neurons alone: `with core_neurons.edit(lm, 0.4):
    generate(lm, prompt)`.

    request: the share that is kept, of each prompt's own core (token_share, sign: as `measure`),
    which acts on what comes after the prompt, by the cache; or a core (layer, neuron), True where
    kept, which acts on all that runs. from_layer: the first layer that is cut, of a share; default
    an eighth of them stay whole. Weights are cut out where one core serves the whole batch, no
    gradient is asked and nobody else reads or changes neurons; else neurons are masked, with the
    same numbers and no gain (`saving` says which). Raises InputError for a share outside 0 to 1 or
    a core of another shape, SiteError for a mixture of experts; on a run, InputError when the
    prompt was read before the block.
    """
    layers, neurons = lm.dims.layers, lm.dims.neurons
    if isinstance(request, (int, float)):
        _refuse(token_share, request, sign)
        first = layers // 8 if from_layer is None else from_layer
        if not 0 <= first < layers:
            raise InputError(f"from_layer={first}: this model has layers 0 to {layers - 1}.")
        lm.layout.resolve("layers.*.mlp.act")

        def find(act: Tensor, run: Run) -> Tensor:
            tally, total = _tally(act, _real(run), token_share, sign)
            return most(tally, float(request), total)

        note = f"core neurons, {request:.0%} from layer {first} on"
        return Core(lm, note=note, find=find, layers=tuple(range(first, layers)))
    core = torch.as_tensor(np.asarray(request))
    if core.shape != (layers, neurons) or core.dtype != torch.bool:
        raise InputError(
            f"a core is True or False for each of {layers} layers and {neurons} neurons; got "
            f"{core.dtype} of {tuple(core.shape)}. Or give the share of neurons to keep."
        )
    cut = [layer for layer in range(layers) if not core[layer].all()]
    masks = [scaled(f"layers.{layer}.mlp.act", core[layer].float()) for layer in cut]
    return Core(lm, masks, note=f"core neurons, {core.float().mean():.0%}")


def _real(run: Run) -> Bool[Tensor, "row position"] | None:
    """Where the tokens of a prompt stand in what runs; generation shifts them to the right."""
    mask, start = run.mask, run.start
    if mask is None or run.batch is None or start is None:
        return mask
    along = torch.arange(mask.shape[1], device=mask.device)
    return mask.gather(1, (along - start.to(mask.device)[:, None]) % mask.shape[1])


def _refuse(token_share: float, keep: float, sign: str) -> None:
    if not (0 < token_share <= 1 and 0 < keep <= 1) or sign not in SIGNS:
        raise InputError(
            f"token_share={token_share}, keep={keep}, sign={sign!r}: shares are above 0 and at "
            f"most 1, and the sign is one of {', '.join(SIGNS)}."
        )
