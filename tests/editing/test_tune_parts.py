"""Tuned parts: nothing outside them moves by a bit, which entries they are by hand, and training
all is plain Adam."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from stratoscope.editing import tune_parts
from stratoscope.engine.train import epoch_rows
from stratoscope.errors import InputError, SiteError
from stratoscope.models import LM
from support.subjects import CORRUPT, ROWS, lm_of, padded, untouched

TEXTS = [*ROWS, *CORRUPT]
ASKED = {"request": [[3, 4, 5], [6, 7]], "only": ["L0H1", "L1 mlp"]}
# a low rate: Adam divides by the gradient, where that is rounding too
EXAMPLE = {"edit": {**ASKED, "steps": 2, "rate": 1e-5}}


def by_hand(lm: LM, name: str) -> dict[str, torch.Tensor]:
    """L0H1 and L1H3 and the MLP of layer 2; llama here has two query heads to each key and value
    head."""
    d, s = lm.dims.dim, lm.dims.head_dim
    moving = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in lm.model.named_parameters()}
    for layer, head in ((0, 1), (1, 3)):
        here = slice(head * s, (head + 1) * s)
        if name == "gpt2":
            at = f"transformer.h.{layer}.attn."
            for side in range(3):
                rows = slice(side * d + here.start, side * d + here.stop)
                moving[f"{at}c_attn.weight"][:, rows] = True
                moving[f"{at}c_attn.bias"][rows] = True
            moving[f"{at}c_proj.weight"][here] = True
        else:
            at, kv = f"model.layers.{layer}.self_attn.", head // 2
            moving[f"{at}q_proj.weight"][here] = True
            for side in "kv":
                moving[f"{at}{side}_proj.weight"][kv * s : (kv + 1) * s] = True
            moving[f"{at}o_proj.weight"][:, here] = True
    inside = "transformer.h.2.mlp." if name == "gpt2" else "model.layers.2.mlp."
    for n, here in moving.items():
        here |= n.startswith(inside)
    return {n: here for n, here in moving.items() if here.any()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_parts_move_and_all_of_them(name: str) -> None:
    lm, only = lm_of(name), ["L0H1", (1, 3), "L2 mlp"]
    moving = by_hand(lm, name)
    with untouched(lm):
        found = tune_parts.parts(lm, only)
        edit = tune_parts.edit(
            lm, padded(TEXTS[:2], "left"), only=only, steps=6, batch_size=2, rate=1e-2
        )
    assert found.keys() == moving.keys()
    assert all(found[n].equal(here) for n, here in moving.items())
    assert edit.deltas.keys() == moving.keys()
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    with edit:
        for n, p in lm.model.named_parameters():
            outside = ~moving[n] if n in moving else torch.ones_like(p, dtype=torch.bool)
            assert p[outside].equal(before[n][outside]), n
            if n in moving:
                assert (p != before[n])[moving[n]].float().mean() > 0.9, n
    shared = "(keys and values are those of L0H0, L1H2 too)" in edit.note
    assert shared == (name == "llama")
    assert f"{sum(int(h.sum()) for h in moving.values()):,} weights" in edit.note


@pytest.mark.parametrize("last", [None, 2])
def test_all_weights_by_plain_adam(last: int | None) -> None:
    lm = lm_of("llama")
    edit = tune_parts.edit(lm, TEXTS, last=last, steps=3, batch_size=2, rate=1e-3, seed=4)
    model = deepcopy(lm.model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        losses = []
        for row in epoch_rows(4, 2, step, 4).tolist():
            ids = torch.tensor([TEXTS[row]])
            nats = -model(ids).logits[0, :-1].log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]]
            losses.append(nats if last is None else nats[-last:])
        optimiser.zero_grad()
        torch.cat(losses).mean().backward()
        optimiser.step()
    after = {n: p.detach() for n, p in model.named_parameters()}
    gap, way = 0.0, 0.0
    for n, p in lm.model.named_parameters():
        moved = edit.deltas.get(n, torch.zeros_like(p))
        gap += float((p.detach() + moved - after[n]).square().sum())
        way += float((after[n] - p.detach()).square().sum())
    assert gap < 1e-3 * way  # Adam divides by the gradient's size: where that is rounding, so is it
    assert edit.note.startswith("all weights trained")


def test_a_head_learns_what_it_is_asked() -> None:
    lm, texts = lm_of("llama"), [[3, 14, 15, 7], [38, 46, 26, 9]]

    def nats() -> float:
        with torch.no_grad():
            said = lm([row[:-1] for row in texts])["logits"][:, -1].log_softmax(-1)
        return -float(said[[0, 1], [7, 9]].mean())

    before = nats()
    with tune_parts.edit(
        lm, texts, only=["L2H0", "L2 mlp"], last=1, steps=20, batch_size=2, rate=1e-2
    ):
        assert nats() < before - 0.5
    assert nats() == before


def test_refusals() -> None:
    lm = lm_of("llama")
    for part in ("L9H0", "L0H9", "L3 mlp", "mlp", (0, 4)):
        with pytest.raises(
            InputError, match="is no part of this model: heads run from L0H0 to L2H3"
        ):
            tune_parts.edit(lm, TEXTS, only=[part])
    with pytest.raises(InputError, match="name one head or MLP"):
        tune_parts.edit(lm, TEXTS, only=[])
    for wrong in ({"steps": 0}, {"batch_size": 5}, {"last": 5}):
        with pytest.raises(InputError, match="one step, a batch"):
            tune_parts.edit(lm, TEXTS, **wrong)
    with untouched(lm), pytest.raises(InputError, match="lower rate"):
        tune_parts.edit(lm, TEXTS, steps=20, rate=1e20)
    with pytest.raises(SiteError, match="next token"):
        tune_parts.edit(lm_of("bert"), TEXTS)
