"""ROME: one fact written into one MLP's weight, so that the other keys of a corpus are written as
little differently as can be.

Paper: textbook (Meng et al., "Locating and editing factual associations in GPT", 2022)

    k*  = mean over contexts of what the MLP's output projection W reads at the subject's last token
    C   = E[k k^T] over the tokens of a corpus, uncentred (`fit`)
    d   = what, added to W k* there, makes the target follow (Adam: target loss in every context,
          KL on "{subject} is a", weight decay)
    W'  = W + d (C^-1 k*)^T / (k*^T C^-1 k*)            so that  W' k* = W k* + d

Of all W' with that property it is the one with the least E |(W' - W) k|^2 over the corpus. The key
is what W itself reads: after the gate, where the MLP has one; d is added before any norm that
follows W. C, and all that is made of it, is in float64, the edit in float32.

Where this differs from the authors' program: W' meets d at the mean key, as the paper says (theirs
at the bare prompt's); the KL is of what follows "{subject} is a", as the paper says (theirs of what
follows its subject); contexts begin with the model's own likeliest texts (theirs with drawn ones).

Reads as: the model now goes on otherwise after this subject in such prompts. Does not show that it
believes it: `editing.fact_scores` asks paraphrases and neighbours, `random_key` is the null; and
that a fact can be written at a layer does not show that the model had it there.
Cost: fit, one run of the corpus up to the layer and neuron^2 a token; edit, `steps` forward and
backward passes of one prompt in each context, and neuron^3 / 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from stratoscope.editing import _facts
from stratoscope.editing._fact_keys import FactEdit, Moments, moments, place, solved, standing
from stratoscope.editing._fact_value import change_of_write
from stratoscope.editing._facts import Text
from stratoscope.engine.edit import Edit
from stratoscope.engine.harvest import begins, harvest
from stratoscope.errors import InputError
from stratoscope.models.inputs import rows_of
from stratoscope.models.lm import LM

_TOKENS = 4096  # of the corpus, whose keys are held at the same time


def rank_one(
    key: Float[Tensor, " neuron"],
    change: Float[Tensor, " dim"],
    moment: Float[Tensor, "neuron neuron"],
) -> Float[Tensor, "dim neuron"]:
    """The D with D key = change that has the least tr(D moment D^T). Raises InputError for a moment
    without full rank."""
    along = solved(moment, key[:, None])[:, 0]
    return torch.outer(change, along / (along @ key))


def fit(
    lm: LM,
    inputs: Any,
    *,
    layers: int | Sequence[int],
    tokens: int | None = None,
    context: int | None = None,
) -> Moments:
    """E[k k^T] of each layer's keys over a corpus, which `rome.edit` and `memit.edit` take.

    inputs: texts, any, or token ids. tokens: how many are read, default all; they should be several
    times as many as the layer has neurons. context: texts are cut into windows of so many tokens,
    default 64 or what the model takes; the token that begins every text (BOS) is not counted.
    Raises InputError for a layer that the model does not have and for texts with fewer tokens;
    SiteError for an MLP that writes nothing linear.
    """
    _facts.refuse(lm)
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers:
        raise InputError("layers=[]: of which layers are the keys?")
    places = {one.site: one for one in (place(lm, layer) for layer in numbers)}
    width = min(64, lm.context or 64) if context is None else context
    bos = begins(lm)
    rows = [row[len(bos) :] if bos and row[: len(bos)] == bos else row
            for row in rows_of(inputs, lm.tokenizer)]  # fmt: skip
    there = sum(map(len, rows))
    wanted = there if tokens is None else tokens
    if not 0 < wanted <= there:
        raise InputError(f"tokens={tokens}: these texts have {there}, BOS not counted.")
    sums = {site: torch.zeros(()) for site in places}
    for part in _parts(rows, wanted):
        kept = harvest(lm, part, list(places), tokens=sum(map(len, part)), context=width)
        for site in places:
            keys = kept[site].double()
            sums[site] = sums[site] + keys.T @ keys
    return Moments(
        moments={site: total / wanted for site, total in sums.items()},
        tokens=wanted,
        settings={"layers": numbers, "context": width},
        seed=None,
        provenance=lm.provenance,
    )


def edit(
    lm: LM,
    request: Any,
    *,
    layer: int,
    covariance: Moments | str | Path,
    prefixes: Sequence[Text] | None = None,
    steps: int = 20,
    rate: float = 0.5,
    kl: float = 0.0625,
    decay: float = 0.5,
    furthest: float = 4.0,
    ridge: float = 0.0,
) -> FactEdit:
    """An edit that writes one fact: `with rome.edit(lm, fact, layer=5, covariance=fitted): ...`.

    request: {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}, as texts
    or as token ids. covariance: what `fit` gave, or its folder. prefixes: texts put before the
    prompt in further contexts, default five of the model's own; [] is the bare prompt alone. steps,
    rate, kl, decay: of d, whose length is at most `furthest` times that of what the MLP writes.
    ridge: the share of the keys' mean square that is added in every direction, for a small corpus.

    Raises InputError for a subject that is not in the prompt or that no token ends with, an empty
    target, a layer that the model does not have, a quantised one, a covariance of another model or
    width or without full rank, and, when entered, an edit that is open already; SiteError for a
    model that does not predict the next token, or an MLP that writes nothing linear.
    """
    _facts.refuse(lm)
    found = _facts.facts(request, ("prompt", "subject", "target_new"))
    if len(found) > 1:
        raise InputError(
            f"{len(found)} facts: ROME writes one at a time. Open one edit inside another, each "
            "made inside those before it, or write all at once with editing.memit."
        )
    at = place(lm, layer)
    moment = moments(lm, covariance).at(at, ridge)
    asked = _facts.question(lm, found[0], _facts.contexts(lm, prefixes))
    [keys] = standing(lm, [at.site], asked.rows, asked.ends)
    size = float(at.write(keys[0]).norm())
    settings = {"steps": steps, "rate": rate, "kl": kl, "decay": decay, "furthest": furthest}
    change = change_of_write(lm, at, asked, size, **settings).double()
    delta = at.stored(rank_one(keys.mean(dim=0), change, moment))
    return FactEdit(lm, deltas={at.name: delta}, note=f"ROME at layer {layer}: {asked.said}")


def random_key(request: Edit, *, seed: int = 0) -> Edit:
    """The null of a fact's edit: each matrix changed by the same writes, as strongly, under keys
    drawn by chance. Raises InputError for an edit that changes no matrix."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, delta in request.deltas.items():
        if delta.ndim != 2:
            raise InputError(f"{name} is no matrix: nothing reads keys there.")
        turned = isinstance(request.lm.model.get_submodule(name.rpartition(".")[0]), Conv1D)
        change = (delta.T if turned else delta).double()
        sizes, writes = torch.linalg.eigh(change @ change.T)
        real = sizes > sizes[-1] * len(sizes) * torch.finfo(sizes.dtype).eps
        noise = torch.randn(change.shape[1], int(real.sum()), generator=generator)
        keys = torch.linalg.qr(noise.to(change)).Q
        drawn = ((writes[:, real] * sizes[real].sqrt()) @ keys.T).to(delta)
        deltas[name] = (drawn.T if turned else drawn).contiguous()
    if not deltas:
        raise InputError("this edit changes no weight: there is no write to put elsewhere.")
    return Edit(request.lm, deltas=deltas, note=f"under keys by chance: {request.note}")


def _parts(rows: Sequence[list[int]], wanted: int) -> list[list[list[int]]]:
    """The first `wanted` tokens of the rows, in groups of about `_TOKENS`."""
    parts: list[list[list[int]]] = [[]]
    room = _TOKENS
    for row in rows:
        row, begin = row[:wanted], 0
        wanted -= len(row)
        while begin < len(row):
            piece = row[begin : begin + room]
            parts[-1].append(piece)
            begin, room = begin + len(piece), room - len(piece)
            if not room:
                parts.append([])
                room = _TOKENS
    return [part for part in parts if part]
