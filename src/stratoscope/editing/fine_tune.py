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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.engine.edit import Edit
from stratoscope.engine.train import Recipe, train
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.loss import next_token_loss
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM


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
    if not lm.family.towers[""].causal or not lm.family.reads_text or not lm.layout.head:
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
    recipe = Recipe(
        student.model,
        partial(_text_loss, student, batch),
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        betas=(0.9, 0.999),
        clip=None,
        training=False,
        schedule=lambda step: rate,
        optimiser=partial(_adam, maximize=ascend),
        after=lambda model, step: stop is not None and bool(stop(student, step)),
    )
    try:
        done = train(recipe, None, seed=0).step
    except ArithmeticError as error:
        raise InputError(f"{error}: take fewer steps, or a lower rate than {rate}.") from error
    before = dict(lm.model.named_parameters())
    deltas = {name: (p - before[name]).detach() for name, p in student.model.named_parameters()}
    moved = {name: delta for name, delta in deltas.items() if bool(delta.any())}
    return Edit(
        lm,
        (),
        moved,
        note=f"{'unlearned' if ascend else 'trained'} on {len(batch)} texts, {done} steps at "
        f"{rate}",
    )


def _text_loss(
    lm: LM, batch: Batch, model: nn.Module, step: int, generator: torch.Generator
) -> Tensor:
    """Of the one text whose turn it is."""
    one = batch.example(step % len(batch))
    return next_token_loss(lm(one)["logits"], *one.text)


def _adam(groups: list[dict[str, Any]], *, maximize: bool) -> torch.optim.Optimizer:
    """Without weight decay."""
    return torch.optim.Adam([group | {"weight_decay": 0.0} for group in groups], maximize=maximize)


def _copy(lm: LM) -> LM:
    """The same model again, its own weights, in eval mode: dropout would draw from the caller's
    generator."""
    model = deepcopy(lm.model).eval()
    return LM(model, lm.family, tokenizer=lm.tokenizer, processor=lm.processor)
