"""What an MLP would have to write at a subject's last token for the model to say something else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.editing._fact_keys import Place
from stratoscope.editing._facts import Question
from stratoscope.engine import outside
from stratoscope.engine.gradients import frozen
from stratoscope.engine.train import Recipe, train
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.taps import Hook

ENOUGH = 0.05  # nats of loss below which nothing more is learned


@contextmanager
def written(lm: LM, place: Place, change: Tensor, ends: Sequence[int]) -> Iterator[None]:
    """Inside the block the projection's output has the change (dim,) added at one position of each
    row, before any norm that follows it."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        rows, at = (torch.tensor(x, device=out.device) for x in (range(len(ends)), ends))
        by_row = out.reshape(len(ends), -1, out.shape[-1])
        added = change.to(out).expand(len(ends), -1)
        return by_row.index_put((rows, at), added, accumulate=True).reshape(out.shape)

    handle = place.module.register_forward_hook(Hook(lm.taps, hook))
    try:
        yield
    finally:
        handle.remove()


class _Change(nn.Module):
    """The vector that is learned."""

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(dim, device=device))


def change_of_write(
    lm: LM,
    place: Place,
    asked: Question,
    size: float,
    *,
    steps: int,
    rate: float,
    kl: float,
    decay: float,
    furthest: float,
) -> Float[Tensor, " dim"]:
    """The vector d that, added to what the MLP writes at the subject's last token, makes the target
    follow, by `steps` steps of Adam from 0:

        mean over contexts and target tokens of -ln p(token)
        + kl KL(p after the essence prompt with d || without) + decay |d| / size^2

    and |d| <= furthest size after each step. size: the length of what d is added to. Float32.
    Raises InputError for settings that are no numbers of their kind, and where the loss is none.
    """
    if steps < 1 or not rate > 0 or min(kl, decay) < 0 or not furthest > 0:
        raise InputError(
            f"steps={steps}, rate={rate}, kl={kl}, decay={decay}, furthest={furthest}: one step "
            "at least, rate and furthest above 0, kl and decay 0 or more."
        )
    ends, device = [*asked.ends, asked.essence_end], lm.model.device
    batch = lm.batch([*([*row, *asked.target[:-1]] for row in asked.rows), asked.essence])
    target = torch.tensor(asked.target, device=device)
    last = torch.tensor([len(row) - 1 for row in asked.rows], device=device)
    places = last[:, None] + torch.arange(len(target), device=device)
    contexts = torch.arange(len(last), device=device)[:, None]
    learned, first, losses = _Change(place.weight.shape[0], device), [], []

    def loss(_: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        with written(lm, place, learned.vector, ends):
            logits = outside.own_logits(lm, batch)
        said = logits[contexts, places].float().log_softmax(dim=-1)
        nats = -said.gather(2, target.expand(len(said), -1)[..., None]).mean()
        after = logits[-1, len(asked.essence) - 1].float().log_softmax(dim=-1)
        if not first:
            first.append(after.detach())
        # a token that can never come is no difference
        moved = torch.where(after.exp() > 0, after.exp() * (after - first[0]), 0.0).sum()
        total = nats + kl * moved + decay * learned.vector.norm() / size**2
        losses.append(total.detach())
        return total

    def settle(_: nn.Module, step: int) -> bool:
        vector = learned.vector
        vector.mul_((furthest * size / vector.norm().clamp_min(1e-30)).clamp(max=1.0))
        return bool(losses[-1] < ENOUGH)

    recipe = Recipe(
        learned,
        loss,
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        decay=0.0,
        betas=(0.9, 0.999),
        clip=None,
        training=False,
        schedule=lambda step: rate,
        optimiser=torch.optim.Adam,
        after=settle,
    )
    with frozen(lm), outside.unheard(lm):
        try:
            train(recipe, None, seed=0)
        except ArithmeticError as error:
            raise InputError(
                f"{error}: lower the rate, which is {rate}, or kl={kl} and decay={decay}."
            ) from error
    return learned.vector.detach()
