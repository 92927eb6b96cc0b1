"""Tell the class of a text: cross-entropy of a classifier's logits.

Paper: textbook (Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3)

    loss = - mean over rows of log softmax(logits[row])[class of row]

Reads as: nats a row, and the share of rows that are right. Does not show whether a cue shorter than
the meaning is enough: give held-out rows that lack it.
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
from stratoscope.errors import InputError
from stratoscope.models.batch import make
from stratoscope.models.lm import LM


def batch(rows: Sequence[Any], tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """input_ids and attention_mask (row, position), right-padded; labels (row,).

    rows: `(text or ids, class)`, or `{"text": ..., "label": ...}`; a class is a number from 0.
    """
    pairs = [_pair(row) for row in rows]
    pad = getattr(tokenizer, "pad_token_id", 0) or 0
    read = make([text for text, _ in pairs], tokenizer, limit=None, pad=pad, image=None)
    ids, mask = read.text
    labels = torch.tensor([label for _, label in pairs])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """loss: nats a row. accuracy: share of rows whose class has the largest logit. targets:
    rows."""
    labels = batch["labels"]
    logits = model(**{n: x for n, x in batch.items() if n != "labels"}).logits.float()
    right = (logits.argmax(-1) == labels).float().mean()
    values = {"loss": nn.functional.cross_entropy(logits, labels), "accuracy": right}
    return values | {"targets": torch.tensor(len(labels))}


def fit(
    lm: LM,
    inputs: Any,
    *,
    steps: int = 300,
    rate: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoints: Sequence[int] = (),
    held_out: Any = (),
) -> Path:
    """The folder of a copy of the classifier that has learned the rows of `inputs`.

    inputs: as `batch` has them. folder, checkpoints, held_out: as `engine.objective.fit` has them.
    Raises InputError for a model without classes, and for a class that it does not have.
    """
    rows = objective.rows_of(inputs)
    classes = getattr(lm.model.config, "num_labels", 0)
    if lm.readout.kind != "classes":
        raise InputError(
            f"{type(lm.model).__name__} has no read-out of classes: load it with "
            "AutoModelForSequenceClassification, and wrap that."
        )
    for row in [*rows, *held_out]:
        _, label = _pair(row)
        if not isinstance(label, int) or not 0 <= label < classes:
            raise InputError(f"a row's class is {label!r}; this model's are 0 to {classes - 1}.")
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
        held_out=list(held_out),
    )


def _pair(row: Any) -> tuple[Any, Any]:
    """Text or ids, and class."""
    return (row["text"], row["label"]) if isinstance(row, dict) else tuple(row)
