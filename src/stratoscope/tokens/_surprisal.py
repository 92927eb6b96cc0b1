"""Surprisal: how unlikely a causal model holds each token, given the text before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.trace import capture
from stratoscope.errors import SiteError
from stratoscope.models import finite, source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

_AT_ONCE = 4096  # tokens that run at the same time; logits are held for one row only


def nats(
    logits: Float[Tensor, "position vocab"], ids: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """-ln p of ids[1:], each given what stands before it; NaN for the first, which nothing
    precedes."""
    chosen = logits[:-1].float().log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([chosen.new_full((1,), torch.nan), -chosen])


@torch.no_grad()
def surprisal(
    lm: LM, rows: Sequence[Sequence[int]], last: Sequence[int] | None = None
) -> Float[Tensor, "example position"]:
    """In nats, on the CPU; NaN for each row's first token and for padding. SiteError unless the
    model is a causal LM.

    last: how many tokens at the end of each row are wanted, default all; the others are NaN, and
    no logits are made for them.
    """
    if not lm.family.towers[""].causal or not lm.family.reads_text:
        raise SiteError(
            f"{lm.family.name} does not predict a next token from those before it: it has no "
            "surprisal."
        )
    source.refuse(
        lm, "a text alone has no surprisal. Read `logits` of `lm.batch(text, target=...)`"
    )
    lm.layout.resolve("logits")
    site = f"layers.{lm.dims.layers - 1}.resid_post"
    width = max(map(len, rows))
    nats_of = torch.full((len(rows), width), torch.nan)
    # the token before the first that is wanted predicts it
    starts = [max(0, len(row) - n - 1) for row, n in zip(rows, last or map(len, rows))]
    size = max(1, _AT_ONCE // width)
    for begin in range(0, len(rows), size):
        part = lm.batch([list(row) for row in rows[begin : begin + size]])
        final = capture(lm, part, site)[site]
        logits_anew = outside.read_out(lm, part, final) if outside.reads_out_anew(lm) else None
        for number, row in enumerate(rows[begin : begin + size]):
            at = slice(starts[begin + number], len(row))
            logits = (
                lm.readout(final[number, at]) if logits_anew is None else logits_anew[number, at]
            )
            loss = nats(logits, torch.tensor(row[at], device=logits.device))
            nats_of[begin + number, at.start + 1 : at.stop] = loss[1:].cpu()
    wanted = [nats_of[n, at + 1 : len(row)] for n, (at, row) in enumerate(zip(starts, rows))]
    finite.refuse({"the surprisal of the texts' tokens": torch.cat(wanted)})
    return nats_of


def real_rows(batch: Batch) -> list[list[int]]:
    """Each example's ids without padding."""
    ids, mask = batch.text
    return [row[real].tolist() for row, real in zip(ids, mask)]
