"""MEMIT: many facts written at once into the MLPs of several layers, each taking a share of what is
missing.

Paper: textbook (Meng et al., "Mass-editing memory in a transformer", 2023)

    z_i  = h_i + d_i     h_i: the stream after the last layer, at the subject's last token of fact
                         i; d_i as in `rome`, added to what that layer's MLP writes
    for each layer l, first to last, with the layers before it changed:
        K    = keys of all facts, (neuron, fact), each a mean over contexts
        R    = (z - h) / (layers that are left, this one too),  h anew     (dim, fact)
        W'   = W + R K^T (preserve C + K K^T)^-1

which is the least of  |D K - R|^2 + preserve E |D k|^2  over D = W' - W. As `preserve` goes to 0,
every key is written in full, and one fact in one layer is ROME. Over the corpus k^T C^-1 k is the
number of neurons on average, so `preserve` is to be compared with that, and is as large unless it
is given (the authors' 15000 was for 16384 neurons). Computed as R (preserve + K^T G)^-1 G^T with
G = C^-1 K, in float64; the edit is in float32.

Where this differs from the authors' program: `preserve`, as said; a fact's key is the plain mean
over its contexts (theirs counts the bare prompt for half); contexts and KL are those of `rome`.

Reads as: what the model goes on with after each of these subjects. Does not show that all facts are
written: with `preserve` none is in full, and the more facts, the less; `editing.fact_scores` counts
them, with paraphrases, neighbours and intervals.
Cost: `steps` forward and backward passes a fact; for each layer one run of all contexts, and
neuron^3 / 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.editing import _facts
from stratoscope.editing._fact_keys import (
    FactEdit,
    Moments,
    Place,
    moments,
    place,
    solved,
    standing,
)
from stratoscope.editing._fact_value import change_of_write
from stratoscope.editing._facts import Question, Text
from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM


def spread(
    keys: Float[Tensor, "neuron fact"],
    missing: Float[Tensor, "dim fact"],
    moment: Float[Tensor, "neuron neuron"],
    preserve: float,
) -> Float[Tensor, "dim neuron"]:
    """The D of least |D keys - missing|^2 + preserve tr(D moment D^T). Raises InputError for a
    moment without full rank."""
    along = solved(moment, keys)
    among = preserve * torch.eye(keys.shape[1]).to(keys) + keys.T @ along
    return torch.linalg.solve(among, missing, left=False) @ along.T


def edit(
    lm: LM,
    request: Any,
    *,
    layers: Sequence[int],
    covariance: Moments | str | Path,
    prefixes: Sequence[Text] | None = None,
    steps: int = 25,
    rate: float = 0.5,
    kl: float = 0.0625,
    decay: float = 0.5,
    furthest: float = 0.75,
    preserve: float | None = None,
    ridge: float = 0.0,
) -> FactEdit:
    """An edit that writes facts: `with memit.edit(lm, facts, layers=[3, 4], covariance=c): ...`.

    request: facts, each as for `rome.edit`. layers: those that are changed; the stream is to be z
    after the last. covariance: what `rome.fit` gave for all of them, or its folder. furthest: the
    length of d at most, in lengths of the stream there. preserve: how much what the corpus's keys
    write counts against the facts, default as many as the layer has neurons. The other options are
    those of `rome.edit`.

    Raises what `rome.edit` raises, InputError for a fact that is asked twice, and SiteError where
    what an MLP writes goes through a norm or a scale before it is added.
    """
    _facts.refuse(lm)
    found = _facts.facts(request, ("prompt", "subject", "target_new"))
    places = [place(lm, layer) for layer in sorted(set(layers))]
    if not places or (preserve is not None and not preserve > 0):
        raise InputError(
            f"layers={list(layers)}, preserve={preserve}: one layer at least, and a number above 0."
        )
    for at in places:
        _refuse_normed(lm, at)
    held = moments(lm, covariance)
    of_layers = [held.at(at, ridge) for at in places]
    before = _facts.contexts(lm, prefixes)
    asked = [_facts.question(lm, fact, before) for fact in found]
    _refuse_twice(asked)
    bare, ends = [one.rows[0] for one in asked], [one.ends[0] for one in asked]
    after = f"layers.{places[-1].layer}.resid_post"
    [stream] = standing(lm, [after], bare, ends)
    settings = {"steps": steps, "rate": rate, "kl": kl, "decay": decay, "furthest": furthest}
    changes = [
        change_of_write(lm, places[-1], one, float(own.norm()), **settings)
        for one, own in zip(asked, stream)
    ]
    wanted, deltas = stream + torch.stack(changes).double(), {}
    for number, (at, moment) in enumerate(zip(places, of_layers)):
        with Edit(lm, deltas=deltas):
            keys = _mean_keys(lm, at, asked)
            [now] = standing(lm, [after], bare, ends)
        missing = (wanted - now) / (len(places) - number)
        against = float(len(moment)) if preserve is None else preserve
        deltas[at.name] = at.stored(spread(keys.T, missing.T, moment, against))
    said = "; ".join(one.said for one in asked[:4])
    more = f"; and {len(asked) - 4} more" if len(asked) > 4 else ""
    numbers = ", ".join(str(at.layer) for at in places)
    return FactEdit(lm, deltas=deltas, note=f"MEMIT at layers {numbers}: {said}{more}")


def _mean_keys(lm: LM, at: Place, asked: Sequence[Question]) -> Float[Tensor, "fact neuron"]:
    rows = [row for one in asked for row in one.rows]
    [keys] = standing(lm, [at.site], rows, [end for one in asked for end in one.ends])
    return keys.unflatten(0, (len(asked), -1)).mean(dim=1)


def _refuse_normed(lm: LM, at: Place) -> None:
    if not at.alone:
        raise SiteError(
            f"what the MLP of layer {at.layer} writes on {lm.family.name} passes a norm or a scale "
            "before it is added to the stream, so what is missing there is no linear map of it, "
            "and cannot be shared among layers: write one fact at a time with editing.rome."
        )


def _refuse_twice(asked: Sequence[Question]) -> None:
    """Raise InputError for two facts with the same prompt."""
    seen: dict[tuple[int, ...], Question] = {}
    for one in asked:
        other = seen.setdefault(tuple(one.rows[0]), one)
        if other is not one:
            raise InputError(
                f"the same prompt is given twice ({other.said}; {one.said}): a fact can be written "
                "once."
            )
