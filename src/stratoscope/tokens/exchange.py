"""Exchange: what the logit difference loses when a token becomes other words of its kind.

Paper: textbook (symmetric token replacement: Zhang and Nanda, "Towards Best Practices of Activation
Patching", 2024)

    attribution[position] = mean over words w of its kind of  d(prompt) - d(prompt with w at that
                                                              position)

d is the logit difference answer - foil at the last token. A token's kind is the words of its shape
that are nearest in embedding space (`_kinds`). low and high: a 95 % t interval of the mean over the
words drawn.

Reads as: what the prediction owes to this word being this one and not another of its kind; every
prompt that is run is text the model could meet. Does not show tokens that stand in for one another,
or what having a word there at all does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from stratoscope.engine.entry import ENTRY, entry, evidence
from stratoscope.engine.estimate import announce
from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.sequence import swept, target
from stratoscope.engine.sweep import Progress
from stratoscope.errors import InputError
from stratoscope.maths.resample import FEWEST, interval
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens import _kinds


def mean_lost(
    lost: Float[np.ndarray, "draw *rest"],  # noqa: F821
) -> Float[np.ndarray, "bounds *rest"]:  # noqa: F821
    """Of each place: the mean over draws, and the low and high end of its 95 % t interval."""
    columns = lost.reshape(len(lost), -1).T
    return np.array([interval(c, method="t")[:3] for c in columns]).T.reshape(3, *lost.shape[1:])


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    draws: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """attribution, low, high (example, position) and logit_difference (example), in logits,
    positive towards the answer.

    answer, foil: one for all examples or one each (default: as `target` chooses); `metric.Whole`
    texts are scored with all their tokens; no token of either is ever put into the prompt. draws:
    words for each token, 5 or more. Special tokens are not exchanged and get 0; NaN at padding and
    at image tokens. Raises SiteError for a model without token embeddings or vocabulary read-out,
    InputError for inputs without tokens or too few draws.
    """
    if draws < FEWEST:
        raise InputError(f"draws={draws}: an interval needs at least {FEWEST} words.")
    batch = lm.batch(inputs)
    x, _ = entry(lm, batch, "zero")
    wanted = target(lm, batch, answer, foil)
    others = _kinds.entries(lm, batch, _kinds.words(lm, batch, draws, seed, wanted))
    width = x.shape[1]
    announce(
        lm,
        batch,
        draws * width / 2 * wanted.runs,
        f"exchange of {width} tokens",
        "Give fewer or shorter prompts; `gradient_times_input` takes two passes.",
    )
    has = [[e for e, tokens in enumerate(batch.tokens) if len(tokens) > p] for p in range(width)]
    cells = [
        replaced(ENTRY, vectors[has[p], p : p + 1], positions=p, examples=has[p])
        for vectors in (x, *others)
        for p in range(width)
    ]
    # the first cells change nothing: the difference of the whole prompt, computed as the others are
    effects = swept(lm, batch, cells, wanted, progress=progress)
    whole, *moved = effects.unflatten(0, (draws + 1, width))
    lost = torch.stack([(whole - difference).T.double() for difference in moved]).cpu().numpy()
    gap = torch.where(evidence(batch), 0.0, torch.nan).cpu().numpy()
    named = zip(("attribution", "low", "high"), mean_lost(lost).astype(np.float32))
    axes = ("example", "position")
    return dataset(
        {name: (axes, value + gap) for name, value in named}
        | {"logit_difference": (("example",), whole[0].float())},
        method="tokens.exchange",
        provenance=lm.provenance,
        settings={"draws": draws},
        seed=seed,
        coords=batch.coords() | wanted.coords,
        notes=" ".join(wanted.notes),
    )
