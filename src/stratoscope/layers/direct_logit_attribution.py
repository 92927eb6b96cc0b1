"""Direct logit attribution: what the embedding, every head and every MLP write straight towards the
answer.

Paper: textbook (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021)

    logit(answer) - logit(foil) = sum_c  N(write_c) . (u_answer - u_foil)  +  bias

write_c is what component c adds to the last position's residual stream; N is the final norm with
its scale held at the value it has on this input, which makes it linear; u are rows of the
unembedding. What a decoder's cross-attention brings from its encoder is one component of each layer
("L3 cross"). The sum is exact: `residual_error` is what floating point leaves. With a soft-cap on
logits the difference is that of the logits before the cap.

A write to every logit alike changes nothing, so each half is counted from the component's mean over
the vocabulary:

    raises_answer[c] = N(write_c) . (u_answer - mean u)        lowers_foil[c] = N(write_c) . (mean
                                                               u - u_foil)

and the two add up to the contribution. A head may have a large one by suppressing the foil and not
touching the answer.

Inside a change of the stream itself (`with intervene(lm, add("layers.3.resid_post", v))`), what
that adds at the last position is one more component, "outer change".

Reads as: who writes the answer into the stream at the end. Does not show who caused it: a component
that only feeds another scores zero here, and a large score may be cancelled by a neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.metric import Words, target
from stratoscope.engine.trace import Trace, capture
from stratoscope.engine.writes import added_outside, final_norm, head_writes
from stratoscope.errors import SiteError
from stratoscope.maths.norm import FrozenNorm
from stratoscope.models import weights
from stratoscope.models.lm import LM
from stratoscope.results import dataset


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, answer: Words = None, foil: Words = None) -> xr.Dataset:
    """Contribution of every component to the logit difference at each example's last token.

    answer, foil: default as `engine.metric.target` chooses. Returns contribution and its two parts,
    raises_answer and lowers_foil (example, component), in logits, with the coordinates layer, head
    (-1 where there is none) and kind; and logit_difference, total, residual_error (example). "bias"
    joins the attention output biases and the final norm's and read-out's. Raises SiteError for a
    model whose residual stream is not a sum (post-norm encoders) or that has no linear read-out.
    """
    _refuse(lm)
    batch = lm.batch(inputs)
    wanted = target(
        lm,
        batch,
        answer,
        foil,
        single="what components write adds up to logits, not to log probabilities",
    )
    ends = ("layers.0.resid_pre", f"layers.{lm.dims.layers - 1}.resid_post")
    points = ("attn.z", "attn.out", "mlp.out", *(("cross.out",) if lm.family.source else ()))
    sites = [*(f"layers.*.{point}" for point in points), *ends]
    seen = capture(lm, batch, *sites, positions=lm.readout.place(batch))
    final = seen[sites[-1]]
    norm = final_norm(lm, final)
    unembed = lm.weight("logits").double()
    middle = unembed.mean(dim=0)
    # (part, example, dim)
    sides = torch.stack([unembed[wanted.answer] - middle, middle - unembed[wanted.foil]])

    def score(write: Tensor) -> Tensor:
        """Both parts (part, example) of a write (example, dim), or (part, example, head) of
        many."""
        frozen = norm if write.ndim == 2 else _wider(norm)
        return torch.einsum("e...d,ped->pe...", frozen.linear(write.double()), sides)

    columns, names, rest = _scores(lm, seen, score)
    bias = rest + sides @ norm.bias.double() + _head_bias(lm, wanted.answer, wanted.foil).to(sides)
    beside = added_outside(lm, batch)
    if beside is not None:
        columns.append(score(beside))
        names.append(("outer change", -1, -1, "change"))
    parts = torch.stack([*columns, bias], dim=2)  # (part, example, component)
    contribution = parts.sum(dim=0)
    names.append(("bias", -1, -1, "bias"))
    normed = final if lm.layout.final_norm is None else lm.layout.final_norm.forward(final)
    difference = wanted.difference(lm.layout.head[-1].forward(normed)).double()
    total = contribution.sum(dim=1)
    component, layer_of, head_of, kind = (list(column) for column in zip(*names))
    return dataset(
        {
            "contribution": (("example", "component"), contribution.float()),
            "raises_answer": (("example", "component"), parts[0].float()),
            "lowers_foil": (("example", "component"), parts[1].float()),
            "logit_difference": (("example",), difference.float()),
            "total": (("example",), total.float()),
            "residual_error": (("example",), (total - difference).float()),
        },
        method="layers.direct_logit_attribution",
        provenance=lm.provenance,
        coords={
            "component": component,
            "layer": (("component",), layer_of),
            "head": (("component",), head_of),
            "kind": (("component",), kind),
            "example_text": batch.coords()["example_text"],
        }
        | wanted.coords,
        notes=" ".join(wanted.notes),
    )


def _wider(norm: FrozenNorm) -> FrozenNorm:
    """The same frozen norm for (example, component, dim)."""
    return replace(norm, scale=norm.scale[:, None])


def _scores(
    lm: LM, seen: Trace, score: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[tuple[str, int, int, str]], Tensor]:
    """Of embedding, heads and MLPs: scores (part, example) and names; and the score of attention's
    biases."""
    columns, names = [score(seen["layers.0.resid_pre"])], [("embed", -1, -1, "embed")]
    bias = torch.zeros_like(columns[0])
    for layer in range(lm.dims.layers):
        at = f"layers.{layer}"
        heads, rest = head_writes(lm, layer, seen[f"{at}.attn.z"])
        columns += score(heads).unbind(2)
        names += [(f"L{layer}H{head}", layer, head, "head") for head in range(heads.shape[1])]
        if lm.family.source:  # what all heads of cross-attention bring from the encoder
            columns.append(score(seen[f"{at}.cross.out"]))
            names.append((f"L{layer} cross", layer, -1, "cross"))
        columns.append(score(seen[f"{at}.mlp.out"]))
        names += [(f"L{layer} mlp", layer, -1, "mlp")]
        bias = bias + score(rest)
    return columns, names, bias


def _head_bias(lm: LM, answer: Tensor, foil: Tensor) -> Tensor:
    """(part, example): the read-out's own bias for the answer and against the foil, from its mean
    over the vocabulary."""
    bias = weights.bias(lm.layout.head[-1])
    if bias is None:
        return torch.zeros(2, len(answer), dtype=torch.double)
    bias = bias.double() - bias.double().mean()
    return torch.stack([bias[answer], -bias[foil]])


def _refuse(lm: LM) -> None:
    lm.layout.resolve("logits")
    if lm.family.towers[""].residual == "post-norm":
        raise SiteError(
            f"{lm.family.name} norms or scales its residual stream after additions, so logits are "
            "not a sum of writes: "
            f"direct logit attribution does not exist for it. Use activation patching."
        )
    if not lm.readout.single:
        raise SiteError(
            f"{type(lm.model).__name__} reads a mean over positions ({lm.readout.where}), not one "
            "of them."
        )
    if len(lm.layout.head) != 1:
        raise SiteError(
            f"{lm.family.name}'s read-out has layers of its own, so logits are not linear in the "
            "writes."
        )
