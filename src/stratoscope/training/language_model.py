"""Predict the next token of texts: the causal language model's own objective.

Paper: textbook (Bengio et al. 2003)

    loss = - mean over targets of log p(token[position + 1] | token[0 .. position])

A target is every real token but the first of a text. Texts of one row (`packed`) do not see each
other: their position ids start anew, and Transformers' masks keep them apart.

Reads as: nats a token. Does not show whether what was learned is more than the texts: give
`held_out`. A model whose mixing ignores position ids (a recurrence, ALiBi) lets packed texts see
each other: leave `pack` out.
Cost: one forward and one backward pass of `batch_size` rows a step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.engine import objective
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.loss import next_token_loss
from stratoscope.models.batch import right_padded
from stratoscope.models.inputs import rows_of
from stratoscope.models.lm import LM

NO_TARGET = -100


def batch(rows: Sequence[Any], tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """input_ids, labels, and position_ids or attention_mask: (row, position), right-padded.

    rows: texts, ids, `{"text": ...}`, or several rows of ids that share one (see `packed`). A label
    stands at its own token; -100 where nothing is asked: padding, and the first token of a text.
    """
    texts = [_ids(row, tokenizer) for row in rows]
    pad = getattr(tokenizer, "pad_token_id", 0) or 0
    ids = right_padded([[i for text in row for i in text] for row in texts], pad)
    first = right_padded([[i for text in row for i in range(len(text))] for row in texts], 0)
    real = torch.arange(ids.shape[1]) < torch.tensor([sum(map(len, r)) for r in texts])[:, None]
    shown = {"input_ids": ids, "labels": ids.masked_fill(~real | (first == 0), NO_TARGET)}
    if all(len(row) == 1 for row in texts):
        return shown | {"attention_mask": real.long()}
    return shown | {"position_ids": first}  # each padding is a text of its own


def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """loss: nats a target. targets: how many there are."""
    shown = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**shown, use_cache=False).logits
    counted = batch["labels"] != NO_TARGET
    loss_value = next_token_loss(logits, batch["labels"], counted)
    return {"loss": loss_value, "targets": counted[:, 1:].sum()}


def packed(inputs: Any, tokenizer: Any, length: int) -> list[list[list[int]]]:
    """Rows of at most `length` tokens, each of several texts one after the other; a text is cut
    where its row is full, and its rest begins the next row as a text of its own."""
    rows: list[list[list[int]]] = [[]]
    room = length
    for row in inputs:
        for ids in _ids(row, tokenizer):
            while len(ids) > 1:  # a single token is no target and has none
                rows[-1].append(ids[:room])
                ids, room = ids[room:], room - len(rows[-1][-1])
                if room < 2:
                    rows.append([])
                    room = length
    return [row for row in rows if row]


def fit(
    lm: LM,
    inputs: Any,
    *,
    steps: int = 1000,
    rate: float = 1e-4,
    batch_size: int = 8,
    pack: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoints: Sequence[int] = (),
    held_out: Any = (),
) -> Path:
    """The folder of a copy of the model that has read `inputs`: texts, rows of ids, a
    `datasets.Dataset` with a column "text".

    rate: of AdamW; it rises over a twentieth of the steps and falls as a cosine to a tenth.
    batch_size: rows a step. pack: tokens a row, of as many texts as it holds; None: a text a row.
    folder, checkpoints, held_out: as `engine.objective.fit` has them. Raises SiteError for a model
    that does not predict the next token, InputError for a text of one token.
    """
    if not lm.family.towers[""].causal or not lm.layout.head:
        raise SiteError(
            f"{lm.family.name} does not predict the next token: there is no loss to train it by."
        )
    rows, held = objective.rows_of(inputs), list(held_out)
    if pack:
        rows, held = packed(rows, lm.tokenizer, pack), packed(held, lm.tokenizer, pack)
    return objective.fit(
        sys.modules[__name__],
        lm,
        rows,
        steps=steps,
        rate=rate,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        checkpoints=checkpoints,
        held_out=held,
    )


def _ids(row: Any, tokenizer: Any) -> list[list[int]]:
    """The texts of one row, as token ids."""
    row = row["text"] if isinstance(row, dict) else row
    if isinstance(row, list) and row and isinstance(row[0], list):
        return row
    [ids] = rows_of([row], tokenizer)
    if len(ids) < 2:
        raise InputError(
            f"the text {row!r:.60} has {len(ids)} tokens: two at least, to predict one."
        )
    return [ids]
