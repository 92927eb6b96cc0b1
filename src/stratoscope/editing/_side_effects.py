"""What steering does to texts that have nothing to do with it: their perplexity, and how far the
model's predictions move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.intervene import Intervention, intervene
from stratoscope.errors import InputError
from stratoscope.models import finite
from stratoscope.models.lm import LM


def measured(
    lm: LM, texts: Any, cells: Sequence[Sequence[Intervention]]
) -> dict[str, tuple[Any, Any]]:
    """Perplexity and KL of unrelated texts under every cell, (layer, strength) of them."""
    batch = lm.batch(texts)
    ids, mask = batch.text
    if not lm.family.towers[""].causal or lm.readout.kind != "vocab" or int(mask.sum(1).min()) < 2:
        raise InputError(
            f"perplexity is of texts of two tokens or more, by a model that predicts each next "
            f"one; {type(lm.model).__name__} was given {int(mask.sum(1).min())} at least."
        )
    scored = mask[:, 1:].float()

    def loss(after: Tensor) -> Tensor:
        each = -after[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return (each * scored).sum(dim=1) / scored.sum(dim=1)

    def run() -> Tensor:
        return outside.own_logits(lm, batch).float().log_softmax(dim=-1)

    before, found = run(), []
    finite.refuse({"of the texts, the model's logits": before}, mask)
    share = before.exp()
    for cell in (one for row in cells for one in row):
        with intervene(lm, cell):
            after = run()
        # a token that can never come is no difference
        away = torch.where(share > 0, share * (before - after), 0.0).sum(dim=-1) * mask
        found.append(torch.stack([loss(after).exp(), away.sum(dim=1) / mask.sum(dim=1)]))
    both = torch.stack(found).unflatten(0, (len(cells), -1)).cpu()
    for row, of_layer in zip(cells, both):
        finite.refuse({f"perplexity or KL (strength, which, text) at {row[0].site}": of_layer})
    axes = ("layer", "strength", "text")
    return {
        "perplexity": (axes, both[:, :, 0]),
        "kl": (axes, both[:, :, 1]),
        "base_perplexity": (("text",), loss(before).exp().cpu()),
    }
