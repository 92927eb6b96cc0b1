"""The next token: the most probable ones after each prompt, and the chances of an answer and a
foil.

Paper: textbook (the softmax of the model's own logits)

    probability[rank] = softmax(logits[last position])[rank-th token]

Reads as: what the model predicts. Does not show how sure it would be of another wording of the same
answer. Of a text the first token is counted; of `metric.Whole(text)` all, each given those before
it.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.metric import Whole as Whole
from stratoscope.engine.metric import Words, last_logits, word
from stratoscope.engine.sequence import probabilities, target, unchanged
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def best(
    logits: Float[Tensor, "example vocab"], top: int
) -> tuple[Float[Tensor, "example rank"], Int[Tensor, "example rank"]]:
    """Probabilities and ids of the `top` most probable tokens."""
    top_tokens = logits.float().softmax(dim=-1).topk(top, dim=-1)
    return top_tokens.values, top_tokens.indices


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, answer: Words = None, foil: Words = None, top: int = 10
) -> xr.Dataset:
    """probability, token (example, rank); answer_id, foil_id, their probabilities and
    logit_difference (example).

    answer, foil: default the top token and a likely one of its kind. Of a classifier `token` is the
    class, and all classes are given where there are fewer than `top`. Raises InputError for a bad
    `top` or answer == foil. Of whole texts answer_id and foil_id are the first tokens', and
    logit_difference is that of log probabilities. The attribute `foil_why` has one sentence for
    each example whose foil was chosen here; notes say where none of the answer's kind was likely.
    """
    batch = lm.batch(inputs)
    logits = last_logits(lm, batch)
    if lm.readout.names:
        top = min(top, logits.shape[1])
    if not 1 <= top <= logits.shape[1]:
        raise InputError(f"top={top}: choose 1 to {logits.shape[1]}.")
    wanted = target(lm, batch, answer, foil)
    values, ids = best(logits, top)
    chances = probabilities(lm, batch, wanted, logits)
    one = ("example",)
    return dataset(
        {
            "probability": (("example", "rank"), values),
            "token": (
                ("example", "rank"),
                [[word(lm, i) for i in row] for row in ids.tolist()],
            ),
            "answer_id": (one, wanted.answer),
            "foil_id": (one, wanted.foil),
            "answer_probability": (one, chances[:, 0]),
            "foil_probability": (one, chances[:, 1]),
            "logit_difference": (one, unchanged(lm, batch, wanted, logits).float()),
        },
        method="tokens.next_token",
        provenance=lm.provenance,
        settings={"top": top},
        coords=batch.coords() | wanted.coords,
        notes=" ".join([*wanted.notes, *dict.fromkeys(r.why for r in wanted.rivals if r.weak)]),
        foil_why=[r.why for r in wanted.rivals],
    )
