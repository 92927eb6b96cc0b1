"""Argument-passing heads: those that read the subject of a question and hand it to the last token.

Paper: factual-recall-pipeline

    attention[layer, head] = sum over tokens s of the subject of pattern[last, s]
    effect[layer, head] = (d(clean) - d(clean with z[layer, last, head] <- corrupt)) / (d(clean) -
        d(corrupt))

The clean prompt asks about one subject ("The capital of France is"), the corrupt one about another;
the subject is where the two differ, before the last token. d is the logit difference answer - foil
at the last token. What is patched is what one query head reads at the last token alone: 0 says that
nothing of the answer came through it there, 1 all of it. A head passes the argument when both are
high. The abstract leaves open how heads are found; this is our reading.

null: the same patch with a random direction, as long as the difference between the clean and the
corrupt z.
Reads as: through which heads the last token learns what it is asked about. Does not show whether a
head carries the subject or already the answer (see heads.answer_suppression for what it writes),
and misses heads that another repeats.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair, random_like
from stratoscope.engine.sequence import swept
from stratoscope.engine.sweep import Progress
from stratoscope.engine.trace import capture
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = (
    "at the last token a random direction, as long as the difference between the head's clean "
    "and corrupt z"
)


def attention_to(
    pattern: Float[Tensor, "layer example head key"], subject: Bool[Tensor, "example key"]
) -> Float[Tensor, "layer example head"]:
    """Attention that falls on the subject's tokens together."""
    return (pattern * subject[:, None]).sum(dim=-1)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Attention to the subject, effect and null of every query head: (example, layer, head).

    inputs: clean prompts. corrupt: as many, of the same token length each, with another subject.
    answer, foil: default the clean run's top token, and the corrupt run's; `metric.Whole` texts are
    scored with all their tokens. seed: of the null.
    Raises InputError when prompts differ in length or both give the same logit difference,
    SiteError where attention cannot be seen (Bloom).
    """
    lm.layout.resolve("layers.*.attn.pattern")
    prompts = pair(lm, inputs, corrupt, answer, foil, "noise")
    (ids, mask), (other, _) = prompts.clean.text, prompts.corrupt.text
    before = torch.arange(ids.shape[1], device=ids.device) < prompts.clean.lengths[:, None] - 1
    subject = torch.ne(ids, other) & before & mask
    sites = ("layers.*.attn.z", "layers.*.attn.pattern")
    read = lm.readout.place(prompts.clean)
    clean = capture(lm, prompts.clean, *sites, positions=read)
    base = clean.stack(sites[0])[:, :, None]  # layer, example, position, head, head_dim
    source = capture(lm, prompts.corrupt, sites[0], positions=read).stack(sites[0])[:, :, None]
    attention = attention_to(clean.stack(sites[1]).float(), subject)
    shape = (lm.dims.layers, lm.dims.heads)
    cells = [
        replaced(
            f"layers.{layer}.attn.z", z[layer, :, :, head : head + 1], positions=read, units=[head]
        )
        for z in (source, random_like(base, source, seed))
        for layer in range(shape[0])
        for head in range(shape[1])
    ]
    difference = swept(lm, prompts.base, cells, prompts.target, progress=progress)
    effect, null = prompts.normalise(difference).T.unflatten(1, (2, *shape)).unbind(1)
    axes = ("example", "layer", "head")
    return dataset(
        {
            "attention": (axes, attention.transpose(0, 1)),
            "effect": (axes, effect),
            "null": (axes, null),
        }
        | prompts.differences,
        method="heads.argument_passing",
        provenance=lm.provenance,
        seed=seed,
        coords=prompts.coords | {"layer": list(range(shape[0])), "head": list(range(shape[1]))},
        null_kind=NULL,
        notes=prompts.notes(null),
    )
