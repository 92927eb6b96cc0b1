"""What the heads of a layer write into the residual stream: where attn.out is taken apart.

With what belongs to it: the norms that writes pass, held at a run's scale, and what outer changes
write beside all heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.errors import SiteError
from stratoscope.maths.norm import FrozenNorm, freeze
from stratoscope.models import weights
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


def post_norms(lm: LM, site: Site, x: Float[Tensor, "*rows width"]) -> list[FrozenNorm]:
    """What follows the projection that writes `site` (Gemma 2's norm, a layer scale), held at its
    scale on x, which the projection reads.

    `forward`, here and elsewhere, and not a call: a call would run the hooks of listeners, who take
    it for a run of the model and make their changes a second time.
    """
    projection, *post = lm.layout.writers(site)
    x, outputs = projection.forward(x), []
    for module in post:
        outputs.append(freeze(module, x))
        x = module.forward(x)
    return outputs


def final_norm(lm: LM, resid: Float[Tensor, "*rows dim"]) -> FrozenNorm:
    """The norm before the read-out, held at its scale on resid.

    Raises SiteError inside a change that comes after the layers: logits are then not what norm and
    unembedding make.
    """
    changed = next(filter(outside.after_the_layers, outside.sites(lm)), None)
    if changed is not None:
        raise SiteError(
            f"inside a change at `{changed}` logits are not a sum of what components write through "
            "norm and unembedding: "
            "measure by intervening (heads.activation_patching, tokens.next_token), which has the "
            "change in it."
        )
    return freeze(lm.layout.final_norm, resid)


def added_outside(lm: LM, batch: Batch) -> Float[Tensor, "example dim"] | None:
    """What outer changes of the stream itself add to it where each example is read, or None.

    Beside the embedding's, heads' and MLPs' writes as they come out changed; together with those it
    sums to the stream.
    """
    points = ("attn.out", "cross.out", "resid_pre", "resid_mid", "resid_post")
    here = {
        s
        for s in outside.sites(lm)
        if s.tower == "" and s.point in points and s != Site("", 0, "resid_pre")
    }
    if not here:
        return None
    last, at = torch.arange(len(batch)), lm.readout.positions(batch)
    total = torch.zeros(len(batch), lm.dims.dim, dtype=torch.double, device=lm.model.device)

    def before(x: Tensor, run: Run) -> Tensor:
        total.sub_(x[last, at])
        return x

    def after(x: Tensor, run: Run) -> None:
        total.add_(x[last, at])

    outer = [(edits, {}) for edits, _ in lm.taps.listening]
    with (
        torch.no_grad(),
        lm.taps.only(({s: [before] for s in here}, {}), *outer, ({}, {s: [after] for s in here})),
    ):
        lm(batch)
    return total


def head_writes(
    lm: LM, layer: int, z: Float[Tensor, "row head head_dim"]
) -> tuple[Float[Tensor, "row head dim"], Float[Tensor, "row dim"]]:
    """Each query head's own part of attn.out, and what belongs to no head (biases).

    In double precision; together they sum to attn.out. A post-norm is held at the scale it has on
    this input.
    """
    [site] = lm.layout.resolve(f"layers.{layer}.attn.out")
    by_head = lm.weight(site).double().unflatten(1, z.shape[1:])
    heads = torch.einsum("rhk,dhk->rhd", z.double(), by_head)
    bias = weights.bias(lm.layout.writers(site)[0])
    rest = torch.zeros_like(heads[:, 0]) if bias is None else bias.double().expand_as(heads[:, 0])
    for norm in post_norms(lm, site, z.flatten(1)):
        rest = norm.linear(rest) + norm.bias
        heads = replace(norm, scale=norm.scale[:, None]).linear(heads)
    return heads, rest
