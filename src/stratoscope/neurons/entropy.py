"""Entropy neurons: those of the last layer that write where the unembedding does not look, and so
set how sure the model is by way of the final norm alone.

Paper: textbook (Stolfo et al., "Confidence Regulation Neurons in Language Models", 2024; Gurnee et
al., "Universal Neurons in GPT2 Language Models", 2024)

    share[neuron]  = |P w|^2 / |w|^2                w: what the neuron writes; P: onto the `dims`
                                                    directions that change the logits least
    effect[unit]   = mean over tokens of |H(act <- mean) - H|       H: entropy of the next token
    held[unit]     = the same, the final norm's scale held at what it was
    through_norm   = 1 - sum held / sum effect

Logits are taken less their mean over the vocabulary, which no probability knows of; the directions
are the last singular ones of U N, N the final norm's weight and centring. A direction drawn at
random has a share of `expected` there.

null: effect and held of random neurons of the same layer.
Reads as: a neuron with a large share, a larger effect than random ones have, and most of it through
the norm, makes the model surer or less sure of whatever it was about to say. Does not show that the
model uses it so: a share without an effect is a neuron that hardly speaks; and earlier layers may
do the same.
Cost: one run of the prompts and one of the reference; a dim^3 decomposition; tokens x vocabulary
products, twice for each neuron that is asked or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.engine.writes import final_norm
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import FrozenNorm, freeze
from stratoscope.models import weights
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.neurons._weights import before, directions, linear
from stratoscope.results import dataset

NULL = "random neurons of the last layer, held at their means one by one"
FAINT = 1e-6  # of the largest singular value: below this a direction changes no logit


def null_space(
    read: Float[Tensor, "vocab dim"], dims: int
) -> tuple[Float[Tensor, "dim null"], Float[Tensor, " dim"]]:
    """The `dims` orthonormal directions that change the logits least, or as many more as change
    none at all; and all singular values, smallest first. read: what each logit reads."""
    read = (read - read.mean(dim=0)).double()
    squares, axes = torch.linalg.eigh(read.T @ read)
    sizes = squares.clamp_min(0).sqrt()
    none = int((sizes <= FAINT * sizes[-1]).sum())
    return axes[:, : max(dims, none)].float(), sizes.float()


def entropy(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """In nats; in double, for differences of such sums are small."""
    logs = logits.double().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    units: Sequence[int] | None = None,
    top: int = 5,
    dims: int | None = None,
    reference: Any = None,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """share (neuron,) of the whole last layer; effect, held, change (example, unit), where change
    is the mean of H(act <- mean) - H with its sign; through_norm (unit,); null, null_held (example,
    draw).

    inputs: prompts, all of whose tokens count. units: neurons of the last layer, default the `top`
    with the largest share. dims: of the space that logits hardly see, default a twentieth of the
    stream's. reference: prompts for the means, default the inputs. draws, seed: of the null. Raises
    InputError for a neuron or a number that is not there; SiteError where logits are not linear in
    what the last norm gives, or there is none.
    """
    linear(lm)
    norm = lm.layout.final_norm
    if norm is None:
        raise SiteError(f"{lm.family.name} has no linear read-out behind a norm: no norm is there.")
    batch, last = lm.batch(inputs), lm.dims.layers - 1
    here, resid = f"layers.{last}.mlp.act", f"layers.{last}.resid_post"
    frozen = freeze(norm, lm.weight("logits")[:1].float())
    size = -(-lm.dims.dim // 20) if dims is None else dims
    if not 1 <= size < lm.dims.dim or draws < 1:
        raise InputError(
            f"dims={size}, draws={draws}: 1 to {lm.dims.dim - 1}, and one draw or more."
        )
    unembed = lm.weight("logits").float()
    basis, _ = null_space(before(norm, unembed), size + frozen.centred)
    write = directions(lm, last, "down").float()
    write = write - write.mean(dim=1, keepdim=True) if frozen.centred else write
    share = (write @ basis).pow(2).sum(dim=1) / write.pow(2).sum(dim=1).clamp_min(1e-30)
    chosen, others = _units(lm, share, units, top, draws, seed)
    mean = capture(lm, inputs if reference is None else reference, here).mean(here).float()
    seen, real = capture(lm, batch, here, resid), batch.text[1]
    asked = torch.tensor([*chosen, *others], device=mean.device)
    moves = _moves(lm, last, seen[here][real].float(), mean, asked)
    found = _entropies(lm, seen[resid][real].float(), moves)
    example = real.nonzero()[:, 0]
    per = torch.zeros(len(batch), *found.shape[1:], dtype=found.dtype, device=found.device)
    per.index_add_(0, example, found)
    per = (per / real.sum(dim=1)[:, None, None]).cpu()
    (effect, null), (held, null_held), (change, _) = (
        x.split([len(chosen), draws], dim=1) for x in per.unbind(dim=-1)
    )
    axes = ("example", "unit")
    return dataset(
        {
            "share": (("neuron",), share),
            "expected": ((), (basis.shape[1] - frozen.centred) / (lm.dims.dim - frozen.centred)),
            "effect": (axes, effect),
            "held": (axes, held),
            "change": (axes, change),
            "through_norm": (("unit",), 1 - _ratio(held, effect)),
            "null": (("example", "draw"), null),
            "null_held": (("example", "draw"), null_held),
        },
        method="neurons.entropy",
        provenance=lm.provenance,
        settings={"dims": basis.shape[1], "draws": draws, "reference": reference is not None},
        seed=seed,
        coords={
            "layer": (("unit",), [last] * len(chosen)),
            "unit_neuron": (("unit",), chosen),
            "example_text": batch.coords()["example_text"],
        },
        null_kind=NULL,
    )


def _ratio(part: Tensor, whole: Tensor) -> Float[Tensor, " unit"]:
    return part.sum(dim=0) / whole.sum(dim=0).clamp_min(1e-30)


def _units(
    lm: LM, share: Tensor, units: Sequence[int] | None, top: int, draws: int, seed: int
) -> tuple[list[int], list[int]]:
    """The neurons asked for, and random others."""
    if units is None and not 1 <= top < lm.dims.neurons:
        raise InputError(f"top={top}: choose 1 to {lm.dims.neurons - 1}.")
    chosen = share.topk(top).indices.tolist() if units is None else [int(n) for n in units]
    if not chosen or not all(0 <= n < lm.dims.neurons for n in chosen):
        raise InputError(
            f"units={chosen}: neurons of the last layer, 0 to {lm.dims.neurons - 1}, at least one."
        )
    free = torch.ones(lm.dims.neurons)
    free[chosen] = 0
    if not bool(free.any()):
        raise InputError(f"all {lm.dims.neurons} neurons are asked for: none is random.")
    generator = torch.Generator().manual_seed(seed)
    return chosen, free.multinomial(draws, replacement=True, generator=generator).tolist()


def _moves(
    lm: LM,
    layer: int,
    act: Float[Tensor, "token neuron"],
    mean: Float[Tensor, " neuron"],
    units: Int[Tensor, " unit"],
) -> Float[Tensor, "unit token dim"]:
    """What the layer's MLP writes otherwise with each neuron at its mean; a norm behind it is
    taken anew."""
    site = Site("", layer, "mlp.out")
    projection, *post = lm.layout.writers(site)
    down = weights.matrix(projection).float()
    moves = (mean[units, None] - act.T[units])[..., None] * down.T[units][:, None]
    if not post:
        return moves
    own = weights.bias(projection)
    plain = act @ down.T + (0 if own is None else own.float())
    changed = plain + moves
    for module in post:
        plain, changed = (_applied(freeze(module, x), x) for x in (plain, changed))
    return changed - plain


def _entropies(
    lm: LM, resid: Float[Tensor, "token dim"], moves: Float[Tensor, "unit token dim"]
) -> Float[Tensor, "token unit value=3"]:
    """|H' - H|, that with the norm held, and H' - H, in float32 whatever the model's precision."""
    unembed, own = lm.weight("logits").float(), weights.bias(lm.layout.head[-1])
    softcap = lm.readout.softcap

    def sure(normed: Tensor) -> Tensor:
        logits = normed @ unembed.T + (0 if own is None else own.float())
        return entropy(logits if softcap is None else torch.tanh(logits / softcap) * softcap)

    norm = final_norm(lm, resid)
    anew = freeze(lm.layout.final_norm, resid + moves)
    plain, rows = sure(_applied(norm, resid)), []
    for n, move in enumerate(moves):
        free = replace(anew, scale=anew.scale[n])
        change = sure(_applied(free, resid + move)) - plain
        held = sure(_applied(norm, resid + move)) - plain
        rows.append(torch.stack([change.abs(), held.abs(), change], dim=-1))
    return torch.stack(rows, dim=1)


def _applied(norm: FrozenNorm, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    return norm.linear(x) + norm.bias
