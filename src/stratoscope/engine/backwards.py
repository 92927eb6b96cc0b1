"""A direction carried back through one component: what to look for in its input, so as to know what
it writes along the direction.

A norm and a head's values are linear once the scale of the norm is held where a run has it; an MLP
is carried back by its gradient at the run's input, the norm before it included.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.alone import Layers
from stratoscope.engine.gradients import frozen
from stratoscope.engine.writes import post_norms
from stratoscope.maths.norm import FrozenNorm
from stratoscope.models.lm import LM


def true_gradient(
    lm: LM, x: Float[Tensor, " dim"], row: Float[Tensor, " dim"]
) -> Float[Tensor, " dim"]:
    """The gradient of row . final_norm(x), the change of the norm's scale included, in double."""
    norm, leaf = lm.layout.final_norm, x.detach().clone().requires_grad_(True)
    with frozen(lm), torch.enable_grad():
        normed = leaf if norm is None else norm.forward(leaf)
        return torch.autograd.grad(normed.double() @ row, leaf)[0].double()


def through_norm(norm: FrozenNorm, y: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """The transpose of `norm.linear`: y . norm.linear(x) == through_norm(norm, y) . x."""
    back = y * norm.weight * norm.scale[..., None]
    return back - back.mean(dim=-1, keepdim=True) if norm.centred else back


def held(
    gradient: Float[Tensor, " dim"], x: Float[Tensor, " dim"], carried: Float[Tensor, ""]
) -> Float[Tensor, " dim"]:
    """The gradient of y . W norm(x), as it is with the scale of the norm held at x.

    Held, the map is linear, so that its product with x is what it carries there, y . W norm(x)
    without what stands there at x = 0. A norm's own change lies along x, so the two differ along x
    alone. x: as the norm has it, a LayerNorm's less its mean.
    """
    return gradient + x * ((carried - gradient @ x) / (x @ x).clamp_min(1e-30))


def to_heads(
    lm: LM,
    layer: int,
    z: Float[Tensor, "row head head_dim"],
    y: Float[Tensor, "vector dim"],
) -> Float[Tensor, "vector _ head head_dim"]:
    """W_O^T y of every query head, in double: its product with the head's z is what it writes along
    y. One row serves all of z, unless a post-norm (Gemma 2) has another scale for each."""
    [site] = lm.layout.resolve(f"layers.{layer}.attn.out")
    back = y.double()[:, None]
    for norm in reversed(post_norms(lm, site, z.flatten(1))):
        back = through_norm(norm, back)
    return (back @ lm.weight(site).double()).unflatten(-1, z.shape[1:])


def through_values(
    layers: Layers,
    layer: int,
    head: int,
    x: Float[Tensor, "position dim"],
    at: int,
    y: Float[Tensor, " head_dim"],
) -> Float[Tensor, " dim"]:
    """W_V^T y through the norm before attention, held at x[at], in double: what the layer reads
    there (x) of which the values *as this query head reads them* carry so much along y.

    The layer itself is asked, so grouped queries share keys and values as the model has it.
    """
    shifted = x + x.pow(2).mean(dim=-1, keepdim=True).sqrt()
    with frozen(layers.lm), torch.enable_grad(), layers:
        leaf = x.detach().clone().requires_grad_(True)
        rows = torch.stack([leaf, torch.zeros_like(x), shifted.detach()])
        v = layers.attention(layer, rows).v[:, head, at].double() @ y.double()
        [gradient] = torch.autograd.grad(v[0], leaf)
    own, nothing, moved = v.detach().unbind()
    here = x[at].double()
    # a LayerNorm does not hear what is added to every coordinate alike
    if (moved - own).abs() <= 1e-3 * (own - nothing).abs():
        here = here - here.mean()
    return held(gradient[at].double(), here, own - nothing)


def through_mlp(
    layers: Layers,
    layer: int,
    x: Float[Tensor, "position dim"],
    at: int,
    y: Float[Tensor, " dim"],
) -> Float[Tensor, " dim"]:
    """The gradient of what the layer's MLP writes along y, at what it reads there (x), in
    double."""
    with frozen(layers.lm), torch.enable_grad(), layers:
        leaf = x.detach().clone().requires_grad_(True)
        written = layers.mlp(layer, leaf[None])[0, at].double() @ y.double()
        [gradient] = torch.autograd.grad(written, leaf)
    return gradient[at].double()
