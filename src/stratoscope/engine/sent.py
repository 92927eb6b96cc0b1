"""What a run sends: the write of every component to the residual stream, whose sum is the stream.

Senders in order of computation: "embed" (all that enters layer 0), every query head, every MLP.

- **Post-norms** (Gemma 2 and 3, OLMo 2). The norm after attention is frozen at the run's own scale
  to split its output into heads: a head's write is what it adds given how loud all heads are
  together.
- **Biases.** What attention adds beside its heads (biases of projection and post-norm) is shared
  equally among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import writes
from stratoscope.engine.alone import outer_changes
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.memory import available, refuse_above
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


@torch.no_grad()
def head_writes(
    lm: LM,
    layer: int,
    z: Float[Tensor, "position head head_dim"],
    outer: Sequence[Intervention] = (),
) -> Float[Tensor, "head position dim"]:
    """What each head adds to the residual stream; their sum is the layer's attn.out.

    In float32 at least, also of a model in half precision: small changes of writes are what edges
    are about. outer: changes made outside; those at this attn.out are made on every head's part.
    Raises SiteError for one that does not act on a sum part by part (a clamp, the largest).
    """
    heads, rest = writes.head_writes(lm, layer, z)
    parts = torch.cat([heads.transpose(0, 1), rest[None]])
    for change in (c for c in outer if c.site == Site("", layer, "attn.out")):
        if change.operation in ("clamp", "largest"):
            raise SiteError(
                f"`{change.operation}` at `{change.site}` acts on what all heads write together, "
                f"so no head's part of it can be told: change `layers.{layer}.attn.z`, or measure "
                "by heads.activation_patching."
            )
        nothing = change.apply(torch.zeros_like(rest)[None], Run())[0]
        parts = torch.stack([change.apply(part[None], Run())[0] - nothing for part in parts])
        parts[-1] += nothing
    return (parts[:-1] + parts[-1] / len(parts[:-1])).to(
        torch.promote_types(z.dtype, torch.float32)
    )


@dataclass(frozen=True)
class Sent:
    """One example's run. writes: (sender, position, dim). pre, mid: what q, k, v and the MLP of
    each layer read: (layer, position, dim). final: what the read-out reads, (position, dim)."""

    writes: Tensor
    pre: Tensor
    mid: Tensor
    final: Tensor


@torch.no_grad()
def sent(lm: LM, batch: Batch) -> Sent:
    """Run one example (without padding) and take apart what every component writes.

    Raises InputError for more than one example, MemoryRefusal when the writes would not fit.
    """
    if len(batch) != 1:
        raise InputError(
            f"edges are taken from one example at a time; this batch has {len(batch)}."
        )
    between = lm.family.towers[""].between
    if between and batch.extra:
        raise InputError(
            f"{between}, so that it is not the sum of what components write: edges do not exist "
            "for a prompt with a "
            f"picture. Use layers.activation_patching."
        )
    wires = wiring(lm)
    size = len(wires.senders) * batch.ids.shape[1] * lm.dims.dim * max(4, lm.model.dtype.itemsize)
    refuse_above(
        4 * size, available(lm.model.device), "what all components write", "shorten the prompt"
    )
    outer = outer_changes(lm)
    read = "resid_pre" if wires.parallel else "resid_mid"
    last = f"layers.{wires.layers - 1}.resid_post"
    names = [
        f"layers.*.{point}" for point in dict.fromkeys(("resid_pre", read, "attn.z", "mlp.out"))
    ]
    seen = capture(lm, batch, *names, last)
    pre, mid, outs = (
        seen.stack(f"layers.*.{point}")[:, 0] for point in ("resid_pre", read, "mlp.out")
    )
    parts = [pre[:1]]
    for layer in range(wires.layers):
        parts += [
            head_writes(lm, layer, seen[f"layers.{layer}.attn.z"][0], outer),
            outs[layer][None],
        ]
    return Sent(torch.cat(parts), pre, mid, seen[last][0])


def random_directions(
    delta: Float[Tensor, "sender position dim"], seed: int, width: int
) -> Float[Tensor, "sender position dim"]:
    """The null: vectors of the same lengths in random directions. width: positions of the longest
    run that is given the same directions, position by position."""
    senders, positions, dim = delta.shape
    noise = torch.randn(senders, width, dim, generator=torch.Generator().manual_seed(seed))
    noise = noise[:, :positions].to(delta)
    return noise * (delta.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
