"""The logit lens: what the model would predict if it stopped after each layer.

Paper: textbook (nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020)

    logits[depth, position] = readout(norm(resid[depth, position]))

depth counts the layers passed: 0 is what enters layer 0, n_layers is the model's own prediction.

Reads as: the depth at which the answer comes to the top, at each token. Does not show that earlier layers "know" the
answer in another basis: the final norm and read-out were trained for the last layer only, so early rows can look like
noise while the information is there.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.metric import Words, target
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset


def answer_rank(logits: Float[Tensor, "*rows vocab"], answer: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """How many tokens score higher than the answer; 0 is the top."""
    own = logits.gather(-1, answer[..., None])
    return (logits > own).sum(dim=-1)


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, answer: Words = None, top: int = 5) -> xr.Dataset:
    """The top tokens at every depth and position, and the rank and probability of the answer.

    answer: one token for all examples or one each (default: the model's own prediction). top: how many tokens to keep.
    Returns probability, token (example, depth, position, rank) and answer_rank, answer_probability (example, depth,
    position). Raises SiteError for a model without a vocabulary read-out, InputError for a bad `top`.
    """
    if not 1 <= top <= lm.dims.vocab:
        raise InputError(f"top={top}: choose 1 to {lm.dims.vocab}.")
    batch = lm.batch(inputs)
    asked = target(lm, batch, answer)
    seen = capture(lm, batch, "layers.0.resid_pre", "layers.*.resid_post")
    depths = [seen["layers.0.resid_pre"], *seen.stack("layers.*.resid_post")]
    kept: list[list[Tensor]] = []
    for resid in depths:  # one depth at a time: logits are wide
        logits = lm.readout(resid).float()
        ids = asked.answer.to(logits.device)[:, None].expand(logits.shape[:2])
        probability = logits.softmax(dim=-1)
        best = probability.topk(top, dim=-1)
        chosen = probability.gather(-1, ids[..., None])[..., 0]
        kept.append([best.values, best.indices, answer_rank(logits, ids), chosen])
    values, indices, rank, chosen = (torch.stack(columns, dim=1) for columns in zip(*kept))
    real = batch.text[1][:, None].expand(rank.shape)
    words = {int(i): token_text(lm.tokenizer, int(i)) for i in indices[real].unique()}
    token = [[[[words[i] for i in cell] if ok else [""] * top for cell, ok in zip(row, oks)]
              for row, oks in zip(example, its)]
             for example, its in zip(indices.tolist(), real.tolist())]  # fmt: skip
    gap = torch.where(real, 0.0, torch.nan)
    axes = ("example", "depth", "position")
    return dataset(
        {
            "probability": ((*axes, "rank"), values + gap[..., None]),
            "token": ((*axes, "rank"), token),
            "answer_rank": (axes, rank + gap),
            "answer_probability": (axes, chosen + gap),
        },
        method="layers.logit_lens",
        provenance=lm.provenance,
        settings={"top": top},
        coords=batch.coords() | asked.coords,
        notes=" ".join(asked.notes),
    )
