"""Concept vectors: the value vectors whose vocabulary projection is one concept, given as a list of
its words.

Paper: concept-vectors

    score[neuron] = mean over the concept's tokens of (logits[neuron, token] - mean) / sd,   logits
        = U . N(W_down[:, neuron])
    share[neuron] = the part of the neuron's n first tokens that are among the concept's n tokens

Mean and deviation are over the vocabulary, by the mean and covariance of U's rows
(neurons.token_neurons). The paper lets GPT-4 and then people judge whether the first tokens of a
vector are one concept; here a word list judges, which needs no judge and finds only concepts that
somebody thought of.

null: the best score and its share for as many random tokens. A search over so many vectors finds
something for any list.
Reads as: where a concept's words are written together. `activation`, its mean over these words,
says whether the neuron speaks at them. Does not show that the model needs the vector: spoil it
(`editing.needle`) and ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.neurons._weights import decode, directions, linear
from stratoscope.neurons.token_neurons import search
from stratoscope.results import dataset

NULL = "the vector that scores best for as many tokens of the vocabulary, drawn at random"


def shared(
    logits: Float[Tensor, "unit vocab"], tokens: Int[Tensor, " token"]
) -> Float[Tensor, " unit"]:
    """The part of each row's first tokens, as many as are given, that are among those given."""
    return torch.isin(logits.topk(len(tokens)).indices, tokens).float().mean(dim=-1)


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, top: int = 5, seed: int = 0) -> xr.Dataset:
    """layer, neuron, score, share and activation of the best vectors of each concept: (example,
    rank).

    inputs: one text for each concept, made of its words, such as " January February March". Special
    tokens are left out. Raises InputError for a concept without a token, or a `top` that is not
    there; SiteError as `neurons.vocabulary`.
    """
    linear(lm)
    if not 1 <= top <= lm.dims.layers * lm.dims.neurons:
        raise InputError(f"top={top}: choose 1 to {lm.dims.layers * lm.dims.neurons}.")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    special = [] if lm.tokenizer is None else lm.tokenizer.all_special_ids
    acts = capture(lm, batch, "layers.*.mlp.act").stack("layers.*.mlp.act")
    generator = torch.Generator().manual_seed(seed)
    concepts, strangers, here = [], [], []
    for example, (row, real) in enumerate(zip(ids, mask)):
        real = real & ~torch.isin(row, torch.tensor(special, device=row.device, dtype=row.dtype))
        if not real.any():
            raise InputError(f"concept {example} has no token of its own: give its words.")
        tokens = row[real].unique()
        concepts.append(tokens)
        stranger = torch.randperm(lm.dims.vocab, generator=generator)[: len(tokens)]
        strangers.append(stranger.to(tokens))
        here.append(real)
    best = list(zip(*search(lm, concepts, side="down", top=top)))
    chance = list(zip(*search(lm, strangers, side="down", top=1)))
    tables = [directions(lm, at, "down") for at in range(lm.dims.layers)]
    rows = []
    for example, real in enumerate(here):
        layer, neuron, score = best[example]
        active = acts[layer, example, :, neuron][:, real].mean(dim=-1)
        share = _shares(lm, tables, layer, neuron, concepts[example])
        alone = _shares(lm, tables, *chance[example][:2], strangers[example])
        rows.append((layer, neuron, score, share, active, chance[example][2][0], alone[0]))
    names = ("layer", "neuron", "score", "share", "activation", "null_score", "null_share")
    values = {name: torch.stack([row[number] for row in rows]) for number, name in enumerate(names)}
    axes = ("example", "rank")
    return dataset(
        {
            name: (axes if value.ndim == 2 else axes[:1], value.cpu())
            for name, value in values.items()
        },
        method="neurons.concept_vectors",
        provenance=lm.provenance,
        settings={"top": top},
        seed=seed,
        coords={"example_text": batch.coords()["example_text"], "rank": list(range(top))},
        null_kind=NULL,
    )


def _shares(
    lm: LM, tables: Sequence[Tensor], layer: Tensor, neuron: Tensor, tokens: Tensor
) -> Float[Tensor, " rank"]:
    rows = [tables[at][unit] for at, unit in zip(layer.tolist(), neuron.tolist())]
    return shared(decode(lm, torch.stack(rows)), tokens)
