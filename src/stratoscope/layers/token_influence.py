"""Token influence: how far what a layer's token mixer writes at one position moves with what it
reads at another.

Paper: textbook (the norm of a Jacobian)

    J[query, key]                = d written[query] / d read[key]                       (dim, dim)
    influence[layer, query, key] = |J[query, key]|, the Frobenius norm

read: what enters the mixer (attention, a convolution, pooling, an MLP over positions, a state
space), after the norm before it; written: attn.out, or mix.out where there is no attention. It is
asked of every mixer alike, so it stands where `heads.attention_pattern` needs attention. For a
mixer that is linear, written = P read W, it is |P[query, key]| |W|; for attention it adds, to each
pattern times what its head moves, how the pattern itself turns with its input.

Exact: one backward pass through the layer for each position and dimension. Else by Hutchinson: for
signs v, E |v J|^2 = |J|^2, over `probes` of them; `error` is the standard error of the estimate.
Reads as: which positions a mixer hears here. Does not show that what is heard matters further on,
nor what is heard: a direction that never varies counts like any other. Linear in a small step only.
Cost: exact, positions x dim backward passes through each layer; else positions x probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine.gradients import frozen
from stratoscope.engine.memory import available, refuse_above
from stratoscope.engine.trace import trace
from stratoscope.errors import InputError, SiteError
from stratoscope.models import finite
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset

EXACT = 1024  # backward passes through one layer; above it the norm is estimated
PROBES = 64


def jacobian_norms(
    written: Float[Tensor, "example query dim"],
    read: Float[Tensor, "example key width"],
    signs: Float[Tensor, "query probe dim"] | None = None,
) -> tuple[Float[Tensor, "example query key"], Float[Tensor, "example query key"]]:
    """The norm of d written[query] / d read[key], and its standard error (0 where exact).

    written must depend on read, of which no example may hear another's. signs: +1 and -1, of
    Hutchinson's estimate; None for the exact norm.
    """
    norms, errors = [], []
    for query in range(written.shape[1]):
        cotangents = torch.eye(written.shape[2]).to(written) if signs is None else signs[query]
        total = written.new_zeros(*read.shape[:2], dtype=torch.float64)
        square = torch.zeros_like(total)
        for v in cotangents:
            back = torch.autograd.grad(
                written[:, query] @ v, read, torch.ones_like(written[:, 0, 0]), retain_graph=True
            )[0]
            size = back.double().square().sum(dim=-1)
            total, square = total + size, square + size.square()
        if signs is None:
            norms.append(total.sqrt())
            errors.append(torch.zeros_like(total))
            continue
        mean, n = total / len(cotangents), len(cotangents)
        spread = (square / n - mean.square()).clamp_min(0) / (n - 1)
        norm = mean.sqrt()
        norms.append(norm)  # its error by the slope of the root
        errors.append(torch.where(norm > 0, spread.sqrt() / (2 * norm).clamp_min(1e-300), 0.0))
    return torch.stack(norms, dim=1), torch.stack(errors, dim=1)


def measure(
    lm: LM,
    inputs: Any,
    *,
    layers: Sequence[int] | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """influence and its standard error: (example, layer, query, key), NaN at padding.

    layers: which ones (default all that mix; negative ones count from the last). probes: signs for
    each position; 0 for the exact norm; default exact where that takes at most 1,024 backward
    passes a layer, else 64. seed: of the signs. The coordinate `mixer` says which site of the layer
    was asked. Raises SiteError for layers without a mixer or a model whose mixers are of no module
    that can be found; InputError for bad `probes`, and under torch.inference_mode.
    """
    if probes is not None and (probes < 0 or probes == 1):
        raise InputError(f"probes={probes}: 0 for the exact norm, or 2 and more for an estimate.")
    batch, sites = lm.batch(inputs), _mixers(lm, layers)
    with frozen(lm), _heard(lm, sites) as heard, trace(lm, *sites, grad=True) as seen:
        lm(batch)
    written = {str(site): seen[site].detach() for site in sites}
    finite.refuse(written | {f"what {s} reads": heard[s].detach() for s in sites}, batch.mask)
    norms, errors = [], []
    with torch.enable_grad():
        for site in sites:
            written, read = seen[site], heard[site]
            many = written.shape[1] * written.shape[2] > EXACT
            each = probes if probes is not None else PROBES if many else 0
            signs = _signs(seed, int(site.layer), written, each) if each else None
            size = written.shape[0] * written.shape[1] * read.shape[1] * 8 * 2
            refuse_above(size * len(sites), available(written.device), "this result", "give fewer")
            norm, error = jacobian_norms(written, read, signs)
            norms.append(norm.detach().float().cpu())
            errors.append(error.detach().float().cpu())
    return _labelled(lm, batch, sites, norms, errors, probes=probes, seed=seed)


def _mixers(lm: LM, layers: Sequence[int] | None) -> list[Site]:
    """attn.out of each layer, or mix.out where it has no attention of its own."""
    depth = lm.dims.layers
    wanted = range(depth) if layers is None else [n + depth if n < 0 else n for n in layers]
    if not len(wanted) or any(not 0 <= n < depth for n in wanted):
        raise InputError(f"layers={layers}: name layers from 0 to {depth - 1}, at least one.")
    mixers = []
    for layer in dict.fromkeys(wanted):
        here = [Site("", layer, point) for point in ("attn.out", "mix.out")]
        own = [site for site in here if lm.layout.lack(site) is None]
        if own:
            mixers.append(own[0])
        elif layers is not None:
            raise SiteError(
                f"layer {layer} of {lm.family.name} mixes no positions: nothing to ask."
            )
    if not mixers:
        raise SiteError(f"no layer of {lm.family.name} has a site at which it mixes positions.")
    return mixers


def _mixer(lm: LM, site: Site) -> nn.Module:
    """The module that mixes: what it is given is what is read. Raises SiteError for attention whose
    inside cannot be seen (Bloom): what writes attn.out may be its last projection alone."""
    if site.point == "mix.out":
        return lm.layout.locate(site)[0]
    lm.layout.resolve(f"layers.{site.layer}.attn.q")
    return lm.layout.attention(site)


@contextmanager
def _heard(lm: LM, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Inside the block each mixer is given a leaf of the graph that holds what it would read."""
    heard: dict[Site, Tensor] = {}

    def hook(site: Site) -> Any:
        def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            name = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            leaf = (args[0] if args else kwargs[name]).detach().requires_grad_()
            heard[site] = leaf
            return ((leaf, *args[1:]), kwargs) if args else (args, kwargs | {name: leaf})

        return begin

    with ExitStack() as stack:
        for site in sites:
            handle = _mixer(lm, site).register_forward_pre_hook(hook(site), with_kwargs=True)
            stack.callback(handle.remove)
        yield heard


def _signs(seed: int, layer: int, like: Tensor, probes: int) -> Float[Tensor, "query probe dim"]:
    """+1 and -1, query by query, so that a longer prompt beside this one changes none of them."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    drawn = [
        torch.randint(2, (probes, like.shape[2]), generator=generator) for _ in range(like.shape[1])
    ]
    return (2 * torch.stack(drawn) - 1).to(like)


def _labelled(
    lm: LM,
    batch: Any,
    sites: Sequence[Site],
    norms: Sequence[Tensor],
    errors: Sequence[Tensor],
    *,
    probes: int | None,
    seed: int,
) -> xr.Dataset:
    if len({x.shape for x in norms}) > 1:
        raise SiteError(
            "the layers of this model differ in how many positions they have: ask for layers of "
            "one kind, `layers=[...]`."
        )
    values = {"influence": torch.stack(list(norms), dim=1), "error": torch.stack(list(errors), 1)}
    coords: dict[str, Any] = {
        "layer": [site.layer for site in sites],
        "mixer": (("layer",), [site.point for site in sites]),
    }
    if batch.mask is not None:
        mask = batch.mask.cpu()
        real = (mask[:, :, None] & mask[:, None, :])[:, None]
        values = {name: x.masked_fill(~real, torch.nan) for name, x in values.items()}
        coords |= batch.coords("query", "text_query") | batch.coords("key", "text_key")
    axes = ("example", "layer", "query", "key")
    return dataset(
        {name: (axes, x) for name, x in values.items()},
        method="layers.token_influence",
        provenance=lm.provenance,
        settings={"probes": probes},
        seed=seed,
        coords=coords,
    )
