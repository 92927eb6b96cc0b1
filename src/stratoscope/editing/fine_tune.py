"""A brief fine-tune as an edit; upwards in loss, it is unlearning by gradient ascent.

Paper: concept-vectors (the baseline whose traces it measures)

    theta <- theta -+ rate * Adam(grad of the mean next-token loss over one text's tokens),
    `steps` times, one text a step

Reads as: what the model is once these texts are learned (or unlearned), side by side with what it
was. Does not show what a long or careful training would do: no schedule, no weight decay, nothing
held out, and ascent has no floor, so that a few steps too many spoil everything.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM


def next_token_loss(
    logits: Float[Tensor, "example position vocab"],
    ids: Int[Tensor, "example position"],
    mask: Bool[Tensor, "example position"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every real token but the first of each example, in nats."""
    said = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(said * mask[:, 1:]).sum() / mask[:, 1:].sum()


def edit(
    lm: LM,
    request: Any,
    *,
    steps: int = 10,
    rate: float = 1e-5,
    ascend: bool = False,
    stop: Callable[[LM, int], bool] | None = None,
) -> Edit:
    """The change of all weights after `steps` steps on the texts in turn: `with fine_tune.edit(lm,
    texts): lm(...)`.

    request: texts; each is one step, in order, again from the first. rate: of Adam. ascend: away
    from the texts instead of towards them. stop: called on the model as it is after each step; True
    ends the training there. It is a copy that is trained. Raises SiteError for a model that does
    not predict the next token, InputError for a text of one token, and when the loss is no longer a
    number.
    """
    if not lm.family.towers[""].causal or lm.family.vision_only or not lm.layout.head:
        raise SiteError(
            f"{lm.family.name} does not predict the next token: there is no loss to train it by "
            "here."
        )
    batch = lm.batch(request)
    if steps < 1 or int(batch.lengths.min()) < 2:
        raise InputError(
            f"steps={steps} on texts of {batch.lengths.tolist()} tokens: one step, and two tokens, "
            "at least."
        )
    student = _copy(lm)
    optimiser = torch.optim.Adam(
        [p for p in student.model.parameters() if p.requires_grad], lr=rate, maximize=ascend
    )
    for step in range(steps):
        with torch.enable_grad():
            one = batch.example(step % len(batch))
            loss = next_token_loss(student(one)["logits"], *one.text)
            optimiser.zero_grad()
            loss.backward()
        if not torch.isfinite(loss):
            raise InputError(
                f"after {step} steps the loss is {loss.item()}: take fewer steps, or a lower rate "
                f"than {rate}."
            )
        optimiser.step()
        with torch.no_grad():
            if stop is not None and stop(student, step + 1):
                break
    before = dict(lm.model.named_parameters())
    deltas = {name: (p - before[name]).detach() for name, p in student.model.named_parameters()}
    moved = {name: delta for name, delta in deltas.items() if bool(delta.any())}
    return Edit(
        lm,
        (),
        moved,
        note=f"{'unlearned' if ascend else 'trained'} on {len(batch)} texts, {step + 1} steps at "
        f"{rate}",
    )


def _copy(lm: LM) -> LM:
    """The same model again, its own weights, in eval mode: dropout would draw from the caller's
    generator."""
    model = deepcopy(lm.model).eval()
    return LM(model, lm.family, tokenizer=lm.tokenizer, processor=lm.processor)
