"""Occlusion: take each token's embedding away, run the model again, and see what the logit
difference loses.

Paper: textbook (Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014; Li
et al., "Understanding Neural Networks through Representation Erasure", 2016)

    attribution[position] = d(prompt) - d(prompt with that token's embedding replaced)

d is the logit difference answer - foil at the last token. Only the token is replaced: its position
stays as it was.

null: the token's entry moved instead by a random direction, as long as the step that occlusion
takes there.
Reads as: what the prediction owes to each token, the others kept. Does not show tokens that stand
in for one another (each alone can go), and a model with a hole in its prompt is not on familiar
ground; compare replacements.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.entry import ENTRY, entry, evidence
from stratoscope.engine.estimate import announce
from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.sequence import swept, target
from stratoscope.engine.sweep import Progress
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = (
    "a random direction added to the token's entry, as long as the step that occlusion takes there"
)


def moved_at_random(
    x: Float[Tensor, "example position dim"],
    blank: Float[Tensor, "example position dim"],
    seed: int,
) -> Float[Tensor, "example position dim"]:
    """x plus a random direction of the length of (blank - x); a position's direction is the same in
    every batch."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack(
        [torch.randn(x.shape[2], generator=generator) for _ in range(x.shape[1])]
    ).to(x)
    length = (blank - x).norm(dim=-1, keepdim=True)
    return x + noise / noise.norm(dim=-1, keepdim=True) * length


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    replacement: str | int = "mean",
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """attribution, null (example, position) and logit_difference (example), in logits, positive
    towards the answer.

    answer, foil: one for all examples or one each (default: as `target` chooses); `metric.Whole`
    texts are scored with all their tokens. replacement: "mean" (the mean embedding of the
    vocabulary), "zero", or one token, as its text or id. seed: of the null. NaN at padding and at
    image tokens. Raises SiteError for a model without token embeddings or vocabulary read-out,
    InputError for inputs without tokens or a replacement that is not one token.
    """
    batch = lm.batch(inputs)
    x, blank = entry(lm, batch, replacement)
    wanted = target(lm, batch, answer, foil)
    width = x.shape[1]
    # half of the token's and half of the null's cells: of a causal model only what follows is run
    announce(
        lm,
        batch,
        width * wanted.runs,
        f"occlusion of {width} tokens",
        "Give fewer or shorter prompts; `gradient_times_input` takes two passes.",
    )
    # who reaches p
    has = [[e for e, tokens in enumerate(batch.tokens) if len(tokens) > p] for p in range(width)]
    cells = [
        replaced(ENTRY, vectors[has[p], p : p + 1], positions=p, examples=has[p])
        for vectors in (x, blank, moved_at_random(x, blank, seed))
        for p in range(width)
    ]
    # the first cells change nothing: the difference of the whole prompt, computed as the others are
    whole, *moved = swept(lm, batch, cells, wanted, progress=progress).unflatten(0, (3, width))
    attribution, null = ((whole - difference).T.float() for difference in moved)
    gap = torch.where(evidence(batch), 0.0, torch.nan)
    axes = ("example", "position")
    return dataset(
        {
            "attribution": (axes, attribution + gap),
            "null": (axes, null + gap),
            "logit_difference": (("example",), whole[0].float()),
        },
        method="tokens.occlusion",
        provenance=lm.provenance,
        settings={"replacement": replacement},
        seed=seed,
        coords=batch.coords() | wanted.coords,
        null_kind=NULL,
        notes=" ".join(wanted.notes),
    )
