"""Answer suppression: how far one layer, by default the last, turns the prediction away from the
answer, and by which heads.

Paper: factual-recall-pipeline

    head_write[head] = N(o[head]) . (u_answer - mean_v u_v)        mlp_write alike, for the MLP
    change = all that the layer writes there: heads, MLP and their biases
    removal[head] = log p(answer with z[layer, last, head] <- 0) - log p(answer)

N is the final norm with its scale held at the value it has on this input. Logits are taken about
their mean over the vocabulary, because what is added to all of them alike changes no prediction;
the abstract leaves this open, so two other readings stand beside it: `raw_change`, without the
mean, and `lens_change`, log p(answer) read by the logit lens after the layer less that before it,
where the norm's scale is free. Below 0 is the paper's anti-overconfidence; the three can disagree.

null: removal of nothing, but z moved as far in a random direction.
`suppressors` names the heads that write most against the answer, for `editing.drop_heads`: find
them on some prompts, take them out on others.
Reads as: which heads of the layer write against the answer, and what the answer gains without them.
Does not show why: a head that lowers every confident guess alike cannot be told from one that knows
this answer to be wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.engine.pair import random_like
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import final_norm, head_writes
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def log_probability(
    logits: Float[Tensor, "row vocab"], answer: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Natural logarithm of the answer's probability in each row."""
    return logits.float().log_softmax(dim=-1).gather(1, answer.to(logits.device)[:, None])[:, 0]


def suppressors(result: xr.Dataset, count: int = 3) -> list[tuple[int, int]]:
    """The (layer, head) of the `count` heads that write most against the answer, the strongest
    first.

    found: as `measure` gives it; examples are averaged. Fewer are given where fewer write against
    it. Raises InputError for a count that the layer does not have.
    """
    write = result.head_write.mean("example")
    if not 1 <= count <= len(write):
        raise InputError(f"{count} heads of a layer that has {len(write)}: ask for 1 to as many.")
    order = write.argsort().values[:count]
    return [(int(result.layer), int(head)) for head in order if write[head] < 0]


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, answer: Words = None, layer: int = -1, seed: int = 0
) -> xr.Dataset:
    """change, raw_change, lens_change, mlp_write, log_probability (example); head_write, removal,
    null (example, head).

    answer: default the model's top token. layer: which, from the end if negative. seed: of the
    null. Raises SiteError for a layer that is not there, and where logits are not linear in what a
    layer writes.
    """
    lm.layout.resolve("logits")
    if lm.family.towers[""].residual == "post-norm" or len(lm.layout.head) != 1:
        raise SiteError(
            f"{lm.family.name}'s logits are not linear in what its heads write, so no head has a "
            "share."
        )
    depth = lm.dims.layers
    if not -depth <= layer < depth:
        raise SiteError(
            f"layer={layer}: this model has {depth}, 0 to {depth - 1}, or -{depth} to -1 from the "
            "end."
        )
    at = f"layers.{layer + depth if layer < 0 else layer}"
    lm.layout.resolve(f"{at}.attn.z")
    batch = lm.batch(inputs)
    logits, one = last_logits(lm, batch), "what a head writes on one token's logit is judged"
    wanted = target(lm, batch, answer, single=one, logits=logits)
    final = f"layers.{depth - 1}.resid_post"
    points = ("attn.z", "mlp.out", "resid_pre", "resid_post")
    read = lm.readout.place(batch)
    seen = capture(lm, batch, *(f"{at}.{point}" for point in points), final, positions=read)
    z, mlp, before, after = (seen[f"{at}.{point}"] for point in points)
    norm, unembed = final_norm(lm, seen[final]), lm.weight("logits").double()
    towards = unembed[wanted.answer] - unembed.mean(dim=0)

    def score(write: Float[Tensor, "example *part dim"], along: Tensor = towards) -> Tensor:
        frozen = norm if write.ndim == 2 else replace(norm, scale=norm.scale[:, None])
        return torch.einsum("e...d,ed->e...", frozen.linear(write.double()), along).float()

    noise = random_like(z[None, :, None], torch.zeros_like(z)[None, :, None], seed)[0]
    cells = [
        replaced(f"{at}.attn.z", value[:, :, head : head + 1], positions=read, units=[head])
        for value in (torch.zeros_like(noise), noise)
        for head in range(lm.dims.heads)
    ]
    own = log_probability(logits, wanted.answer)
    lens = [log_probability(lm.readout(x), wanted.answer) for x in (before, after)]
    changed = sweep(
        lm,
        batch,
        cells,
        lambda logits, example: log_probability(logits, wanted.answer[example.cpu()]),
    )
    removal, null = (changed - own).T.unflatten(1, (2, lm.dims.heads)).unbind(1)
    by_head, alone = ("example", "head"), ("example",)
    return dataset(
        {
            "change": (alone, score(after - before)),
            "raw_change": (alone, score(after - before, unembed[wanted.answer])),
            "lens_change": (alone, lens[1] - lens[0]),
            "mlp_write": (alone, score(mlp)),
            "head_write": (by_head, score(head_writes(lm, int(at.split(".")[1]), z)[0])),
            "removal": (by_head, removal),
            "null": (by_head, null),
            "log_probability": (alone, own),
        },
        method="heads.answer_suppression",
        provenance=lm.provenance,
        settings={"layer": layer},
        seed=seed,
        coords={
            "layer": ((), int(at.split(".")[1])),
            "head": list(range(lm.dims.heads)),
            "example_text": batch.coords()["example_text"],
            "answer": wanted.coords["answer"],
        },
        null_kind="the head's z moved by its own length in a random direction",
        notes=" ".join(wanted.notes),
    )
