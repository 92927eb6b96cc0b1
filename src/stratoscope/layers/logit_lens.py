"""The logit lens: what the model would predict if it stopped after each layer.

Paper: textbook (nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020)

    logits[depth, position] = readout(norm(resid[depth, position]))

depth counts the layers passed: 0 is what enters layer 0, n_layers is the model's own prediction.

Reads as: the depth at which the answer comes to the top, at each token. Does not show that earlier
layers "know" the answer in another basis: the final norm and read-out were trained for the last
layer only, so early rows can look like noise while the information is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.memory import available, predicted, refuse_above
from stratoscope.engine.metric import Words, target
from stratoscope.engine.sweep import Progress
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset

SITES = ("layers.0.resid_pre", "layers.*.resid_post")
_STREAMS = 2**28  # bytes of residual streams that are held at once
_LOGITS = 2**26  # bytes of logits that are held at once


def answer_rank(
    logits: Float[Tensor, "*rows vocab"], answer: Int[Tensor, "*rows"]
) -> Int[Tensor, "*rows"]:
    """How many tokens score higher than the answer; 0 is the top."""
    own = logits.gather(-1, answer[..., None])
    return (logits > own).sum(dim=-1)


def ranked(
    logits: Float[Tensor, "row vocab"], answer: Int[Tensor, " row"], top: int
) -> tuple[Tensor, ...]:
    """The largest probabilities and their tokens (row, top), the answer's rank and probability
    (row,); no second array of the logits' size is made but the one that counts ranks."""
    best, whole = logits.topk(top, dim=-1), logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(-1, answer[:, None])
    return (
        (best.values - whole).exp(),
        best.indices,
        answer_rank(logits, answer),
        (own - whole).exp()[:, 0],
    )


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, answer: Words = None, top: int = 5, progress: Progress | None = None
) -> xr.Dataset:
    """The top tokens at every depth and position, and the rank and probability of the answer.

    answer: one token for all examples or one each (default: the model's own prediction). top: how
    many tokens to keep. progress: called with (tokens read out, tokens in all), a depth's token
    counting as one. Prompts, and the tokens of a depth, are read in pieces. Returns probability,
    token (example, depth, position, rank) and answer_rank, answer_probability (example, depth,
    position); the coordinate `read_at` (example) is the position of the prediction: the last token,
    of a masked language model its mask. Raises SiteError for a model without a vocabulary read-out,
    InputError for a bad `top`, MemoryRefusal when the result itself would not fit.
    """
    if not lm.dims.vocab:
        raise SiteError(f"{lm.family.name} has no vocabulary read-out: a lens has no words to say.")
    if not 1 <= top <= lm.dims.vocab:
        raise InputError(f"top={top}: choose 1 to {lm.dims.vocab}.")
    batch = lm.batch(inputs)
    wanted = target(lm, batch, answer, single="each layer is read as the next token")
    real, depths = batch.text[1], lm.dims.layers + 1
    shape = (len(batch), depths, real.shape[1])
    _refuse_too_large(lm, batch, top)
    values, indices = (
        torch.full((*shape, top), torch.nan),
        torch.zeros(*shape, top, dtype=torch.long),
    )
    rank, chosen = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    rows, done, total = max(1, _LOGITS // (4 * lm.dims.vocab)), 0, depths * int(real.sum())
    anew = outside.reads_out_anew(lm)  # a change after the layers: then by whole runs
    for where, part in _parts(lm, batch):
        seen = capture(lm, part, *SITES)
        example, position = part.text[1].nonzero(as_tuple=True)  # no padding is read out
        streams = [seen[site] for site in lm.layout.resolve(SITES)]
        for depth, resid in enumerate(streams):
            anew_logits = outside.read_out(lm, part, resid) if anew else None
            for e, p in zip(example.split(rows), position.split(rows)):
                logits = lm.readout(resid[e, p]) if anew_logits is None else anew_logits[e, p]
                pieces = ranked(logits.float(), wanted.answer.to(e.device)[where][e], top)
                at = (e.cpu() + where.start, depth, p.cpu())
                for table, piece in zip((values, indices, rank, chosen), pieces):
                    table[at] = piece.to(table)
                done += len(e)
                if progress:
                    progress(done, total)
    axes = ("example", "depth", "position")
    return dataset(
        {
            "probability": ((*axes, "rank"), values),
            "token": ((*axes, "rank"), _texts(lm, indices, real.cpu())),
            "answer_rank": (axes, rank),
            "answer_probability": (axes, chosen),
        },
        method="layers.logit_lens",
        provenance=lm.provenance,
        settings={"top": top},
        coords=batch.coords()
        | wanted.coords
        | {"read_at": (("example",), lm.readout.positions(batch).cpu())},
        notes=" ".join(wanted.notes),
    )


def _parts(lm: LM, batch: Batch) -> Iterator[tuple[slice, Batch]]:
    """So many examples at once that their residual streams stay below `_STREAMS` bytes.

    A batch with images, and one under changes from outside, which may number its examples, stays
    whole.
    """
    each = predicted(lm, lm.layout.resolve(SITES), batch) // len(batch)
    size = max(1, _STREAMS // max(each, 1))
    changed = any(edits for edits, _ in lm.taps.listening) or any(outside.foreign_hooks(lm.model))
    if size >= len(batch) or batch.extra or batch.ids is None or changed:
        yield slice(0, len(batch)), batch
        return
    ids, mask = batch.text
    for begin in range(0, len(batch), size):
        where = slice(begin, begin + size)
        width = int(mask[where].sum(dim=1).max())
        yield where, Batch(ids[where, :width], mask[where, :width], {}, batch.tokens[where])


def _refuse_too_large(lm: LM, batch: Batch, top: int) -> None:
    """A cell of the result takes a probability, an id and a text for each of the top tokens."""
    width = batch.text[1].shape[1]
    needed = len(batch) * (lm.dims.layers + 1) * width * (32 * top + 32)
    what = f"the logit lens of {len(batch)} prompts of {width} tokens"
    advice = "give fewer or shorter prompts at once, or a smaller `top`"
    refuse_above(needed, available(torch.device("cpu")), what, advice)


def _texts(lm: LM, indices: Tensor, real: Tensor) -> np.ndarray:
    """(example, depth, position, rank) texts; "" at padding."""
    ids, place = np.unique(indices.numpy(), return_inverse=True)
    words = np.array([token_text(lm.tokenizer, int(i)) for i in ids], dtype=object)
    texts = words[place.reshape(indices.shape)]
    texts[~real.numpy()[:, None].repeat(texts.shape[1], axis=1)] = ""
    return texts
