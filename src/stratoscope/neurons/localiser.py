"""Localiser: the units that respond more to one kind of text than to another, as the language
network is found in a brain.

Paper: untrained-language-network

    x[example, layer, dim]  = the stream after a layer, at the last token (or the mean of all)
    t[layer, dim]           = (m1 - m2) / sqrt(s1^2 / n1 + s2^2 / n2)         Welch's t
    chosen[layer, dim]      = t is among the largest `share` of all units of the model
    response[example]       = mean over the chosen of (x - mean) / deviation

m, s^2, n are the mean, the variance (n - 1) and the number of examples of `inputs` (1) and `other`
(2); mean and deviation those of all examples of both. Responses are the paper's profile, for any
texts. They are in deviations, ours, so that no unit speaks for all: a few dimensions of a trained
stream are hundreds of times as large as the others. The authors' code takes what norms, attention
and MLPs put out, here `layers.*.attn.out` and `layers.*.mlp.out`.

null: t of the same examples with their labels shuffled.
Reads as: where the model tells the two kinds of text apart. Does not show what for: units that
count tokens are found as well when one kind has more of them (`lab.stimuli` makes texts of equal
length), and chosen units respond more to what they were chosen on: take other texts for `response`.
Cost: one forward pass over the texts; one sort of the units for each draw.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "labels shuffled among the examples of both"
SITE = "layers.*.resid_post"


def welch(
    one: Float[Tensor, "example ..."], two: Float[Tensor, "other ..."]
) -> Float[Tensor, "..."]:
    """Welch's t of every unit; 0 where the two are the same constant, infinite where they are two.

    Raises InputError for fewer than two examples of either: they have no variance.
    """
    if min(len(one), len(two)) < 2:
        raise InputError(f"{len(one)} and {len(two)} examples: a t needs two or more of each.")
    one, two = one.double(), two.double()
    away = one.mean(dim=0) - two.mean(dim=0)
    error = (one.var(dim=0) / len(one) + two.var(dim=0) / len(two)).sqrt()
    return torch.where(away == 0, 0.0, away / error)


def top(score: Float[Tensor, "..."], share: float) -> Bool[Tensor, "..."]:
    """The `share` of units with the largest score, at least one; of equal ones the earlier."""
    order = score.flatten().argsort(descending=True, stable=True)
    best = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    best[order[: max(1, round(share * score.numel()))]] = True
    return best.reshape(score.shape)


@torch.no_grad()
def states(
    lm: LM, inputs: Any, *, pool: str = "last", site: str = SITE
) -> Float[Tensor, "example layer unit"]:
    """What every unit says of each input, at its last token or on average over its tokens.

    site: one point of every layer with one vector for each token, such as `layers.*.mlp.act`.
    Raises SiteError for another one, and InputError for another `pool`.
    """
    sites = lm.sites(site)
    if any(at.axes[:2] != ("example", "position") or len(at.axes) != 3 for at in sites):
        raise SiteError(
            f"`{site}` has axes {', '.join(sites[0].axes)}: units are read where every token has "
            f"one vector, such as `{SITE}` or `layers.*.mlp.act`."
        )
    if pool not in ("last", "mean"):
        raise InputError(f"pool={pool!r}: choose 'last' or 'mean'.")
    batch = lm.batch(inputs)
    seen = capture(lm, batch, site, positions=-1 if pool == "last" else None)
    stack = seen.stack(site).transpose(0, 1)
    if pool == "last":
        return stack.float()
    if batch.mask is None:
        return stack.float().mean(dim=2)
    real = batch.mask[:, None, :, None]
    return (stack.float() * real).sum(dim=2) / real.sum(dim=2)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    other: Any,
    share: float = 0.01,
    pool: str = "last",
    site: str = SITE,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """t, chosen, mean and deviation of every unit (layer, dim; or layer, neuron at `mlp.act`), and
    null (draw, layer, dim).

    inputs, other: texts that the units shall and shall not respond to, as many tokens long. share:
    of all units. pool: the last token, or the mean of all. draws, seed: of the null. Raises
    InputError for a share outside 0 to 1, negative draws or fewer than two examples of either;
    otherwise as `states` does.
    """
    if not 0 < share < 1 or draws < 0:
        raise InputError(f"share={share} and draws={draws}: a share is above 0 and below 1.")
    parts = [states(lm, texts, pool=pool, site=site) for texts in (inputs, other)]
    t, every = welch(*parts), torch.cat(parts)
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in parts]
    orders = [torch.randperm(len(every), generator=generator) for _ in range(draws)]
    null = [welch(*every[order.to(every.device)].split(sizes)) for order in orders]
    axes = ("layer", lm.sites(site)[0].axes[-1])
    arrays = {"t": t, "mean": every.mean(dim=0), "deviation": every.std(dim=0)}
    return dataset(
        {name: (axes, array.float()) for name, array in arrays.items()}
        | {
            "chosen": (axes, top(t, share)),
            "null": (("draw", *axes), torch.stack(null).float() if null else t[None][:0].float()),
        },
        method="neurons.localiser",
        provenance=lm.provenance,
        settings={"share": share, "pool": pool, "site": site, "draws": draws},
        seed=seed,
        coords={"layer": [at.layer for at in lm.sites(site)]},
        null_kind=NULL,
    )


def response(
    x: Float[Tensor, "example layer unit"],
    localised: xr.Dataset,
    chosen: Bool[Tensor, "layer unit"] | None = None,
) -> Float[Tensor, " example"]:
    """Mean of the chosen units (default those of `localised`), each in deviations from its mean.

    x: `states` of any texts; localised: what `measure` gave for the same model, site and pool. A
    unit that never varied is 0. Raises InputError for units of another shape.
    """
    mean, deviation = (torch.tensor(localised[name].values) for name in ("mean", "deviation"))
    if x.shape[1:] != mean.shape:
        raise InputError(
            f"states of (layer, unit) = {tuple(x.shape[1:])} and a localiser of "
            f"{tuple(mean.shape)}: take both of the same model and site."
        )
    mask = torch.tensor(localised["chosen"].values) if chosen is None else chosen.cpu()
    away = x.cpu() - mean
    z = torch.where(deviation > 0, away / deviation.clamp_min(1e-30), 0.0)
    return z[:, mask].mean(dim=1)
