"""Direct effect: what the answer's logit changes by when a head's own write to the output, and
nothing else, is that of another prompt.

Paper: arithmetic-heads

    effect[layer, head] = mean over pairs of (logit(answer; x + d) - logit(answer; x)) /
                          |logit(answer; x)|
    d = write of the head in the corrupt run - in the clean run, x the last stream of the clean run

at the position where the answer is said; final norm, read-out and soft-cap are computed anew. Below
0: the head speaks for the answer, and without what it knows of this prompt the logit falls by that
share. `mlp_effect` is the same of MLPs. `strongest` gives the heads and MLPs by how much falls.

The paper divides by the clean logit; its size is the same where that is above 0.

null: every d replaced by a random direction of its length.
Reads as: which components bring the answer to the output. Does not show how they know it, and what
a head does through later ones is left out: one that finds the operands for others is not seen here.
Cost: two passes of each prompt, and a norm for each of its heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.metric import Words, target
from stratoscope.engine.sent import head_writes, random_directions
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.errors import InputError
from stratoscope.maths.norm import freeze
from stratoscope.models.lm import LM
from stratoscope.models.weights import bias, matrix
from stratoscope.results import dataset

NULL = "every change replaced by a random direction of its length"
LEAST = 1e-3  # of a clean logit, of which an effect is to be a share


def strongest(
    effect: Float[np.ndarray, "layer head"], count: int, mlp_effect: Any = (), mlps: int = 0
) -> list[str]:
    """The heads, and then the MLPs, without which the logit falls most, by name ("L3H2", "L5
    mlp")."""
    heads = [divmod(int(n), effect.shape[1]) for n in np.argsort(effect, axis=None, kind="stable")]
    layers = np.argsort(np.asarray(mlp_effect), kind="stable")
    return [f"L{a}H{b}" for a, b in heads[:count]] + [f"L{layer} mlp" for layer in layers[:mlps]]


@torch.no_grad()
def logit_of(
    lm: LM, x: Float[Tensor, "*rows example dim"], answer: Tensor
) -> Float[Tensor, "*rows example"]:
    """The logit of each example's answer, read from last streams as the model reads them."""
    readout = lm.readout
    if len(readout.modules) != 1:
        index = answer.expand(x.shape[:-1])[..., None]
        return readout(x.to(lm.model.dtype)).gather(-1, index)[..., 0].float()
    # one matrix: the rows of the answers are enough
    [head] = readout.modules
    norm = freeze(readout.norm, x)  # in float32, also of a model in half precision
    normed = norm.linear(x) + norm.bias
    said, added = (normed * matrix(head)[answer].float()).sum(dim=-1), bias(head)
    said = said if added is None else said + added[answer].float()
    cap = readout.softcap
    return said if cap is None else torch.tanh(said / cap) * cap


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    draws: int = 1,
    seed: int = 0,
) -> xr.Dataset:
    """effect (layer, head) and mlp_effect (layer), with their nulls (draw, layer, head) and (draw,
    layer).

    change (example, layer, head), mlp_change (example, layer): of each pair. clean_logit,
    corrupt_logit (example): of the answer. inputs, corrupt: prompts pair by pair. answer: default
    the clean run's top token. Raises SiteError for a stream that is no sum of writes; InputError
    for unequal numbers of prompts, or a clean logit so near 0 that nothing is a share of it.
    """
    wiring(lm)
    lm.layout.resolve("logits")
    clean, other = lm.batch(inputs), lm.batch(corrupt)
    if len(clean) != len(other):
        raise InputError(f"{len(clean)} prompts and {len(other)} corrupt ones: give one for each.")
    wanted = target(lm, clean, answer)
    names = ["layers.*.attn.z", "layers.*.mlp.out", f"layers.{lm.dims.layers - 1}.resid_post"]
    base, source = (
        capture(lm, batch, *names, positions=lm.readout.place(batch)) for batch in (clean, other)
    )
    last, asked = base[names[2]].float(), wanted.answer.to(lm.model.device)
    plain = logit_of(lm, last, asked)
    if bool((plain.abs() < LEAST).any()):
        number = int(plain.abs().argmin())
        raise InputError(
            f"pair {number}: the logit of {wanted.answer_text[number]!r} is {plain[number]:.1e} in "
            "the clean run, so a change of it is no share. Ask for another answer."
        )
    rows, nulls = [], []
    for layer in range(lm.dims.layers):
        z, out = f"layers.{layer}.attn.z", f"layers.{layer}.mlp.out"
        heads = [head_writes(lm, layer, seen[z]) for seen in (base, source)]
        delta = torch.cat([heads[1] - heads[0], (source[out] - base[out])[None].float()])

        def changed(moved: Tensor) -> Tensor:
            return (logit_of(lm, last + moved, asked) - plain) / plain.abs()

        rows.append(changed(delta))
        drawn = [_random(delta, seed, draw * lm.dims.layers + layer) for draw in range(draws)]
        nulls.append(torch.stack([changed(moved).mean(dim=-1) for moved in drawn]))
    change = torch.stack(rows, dim=1).permute(2, 1, 0).double().cpu()  # example, layer, writer
    null = torch.stack(nulls, dim=1).double().cpu()  # draw, layer, writer
    return dataset(
        {
            "effect": (("layer", "head"), change[..., :-1].mean(dim=0)),
            "mlp_effect": (("layer",), change[..., -1].mean(dim=0)),
            "change": (("example", "layer", "head"), change[..., :-1]),
            "mlp_change": (("example", "layer"), change[..., -1]),
            "clean_logit": (("example",), plain),
            "corrupt_logit": (("example",), logit_of(lm, source[names[2]].float(), asked)),
            "null_effect": (("draw", "layer", "head"), null[..., :-1]),
            "null_mlp_effect": (("draw", "layer"), null[..., -1]),
        },
        method="heads.direct_effect",
        provenance=lm.provenance,
        settings={"draws": draws},
        seed=seed,
        coords=clean.coords()
        | {
            "answer": (("example",), list(wanted.answer_text)),
            "layer": list(range(lm.dims.layers)),
            "head": list(range(lm.dims.heads)),
        },
        null_kind=NULL,
        notes=" ".join(wanted.notes),
    )


def _random(
    delta: Float[Tensor, "writer example dim"], seed: int, number: int
) -> Float[Tensor, "writer example dim"]:
    """A direction for each writer, the same for all examples."""
    one = random_directions(delta[:, :1], 1_000_003 * seed + number, 1)
    one = one / one.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return one * delta.norm(dim=-1, keepdim=True)
