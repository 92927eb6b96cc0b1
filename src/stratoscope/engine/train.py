"""The one loop that trains: deterministic by seed, resumable bit for bit, safe to kill.

A `Recipe` says what is learned; `train` learns it. The data of a step are a pure function of (seed,
step): `loss(model, step, generator)` draws them with `generator`, made anew for each step, or asks
`epoch_rows` for its share of a shuffled data set. Dropout is seeded by the step as well. So nothing
but the weights, the optimiser's moments and the step must be kept (`engine/checkpoint.py`), and a
resumed run continues as if it had never stopped. A run on another number of threads is as good, but
sums in another order: its weights differ in the last bits.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.engine import checkpoint
from stratoscope.engine.checkpoint import Story
from stratoscope.engine.progress import Progress, silent
from stratoscope.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """What is learned, and how. The learning rate rises for `warmup` steps, then falls as a cosine
    to `floor * rate`.

    model: with fresh weights, or the ones to go on from; it is trained in place. loss(model, step,
    generator): the mean loss of this step's batch. save(model, folder): writes an ordinary Hugging
    Face folder, tokenizer included. judge(model): held-out numbers, called without gradients, in
    evaluation mode; must draw no random number it does not seed. checkpoints: steps whose weights
    are kept in `checkpoints/step-N` (0: untrained).

    decay: weight decay, of matrices only. embedding_rate: of embeddings, which then do not decay;
    None: as other matrices. A token that is met once in a thousand is moved as rarely, where every
    token moves a matrix. rates: regular expression of parameter names -> factor of the learning
    rate; the first that is found in a name counts. select(name): whether this parameter is trained;
    the others get no gradient, and stay as they are to the bit. after(model, step): called after
    each step with its number, the first is 1: to project weights, to move a mean (kept in a buffer,
    else a resumed run forgets it); True ends the training there. training: False keeps the model in
    evaluation mode, without dropout. clip: largest norm of the gradient; None: any. optimiser:
    another one than AdamW, made from the groups of parameters; its state must be tensors.
    schedule(step): the learning rate, instead of the one above.

    data: for the card, corpus by corpus, where it comes from. notes: what a reader of the card must
    know.
    """

    model: nn.Module
    loss: Callable[[nn.Module, int, torch.Generator], Tensor]
    save: Callable[[nn.Module, Path], object] | None
    judge: Callable[[nn.Module], dict[str, float]] | None
    steps: int
    rate: float
    warmup: int = 50
    floor: float = 0.1
    decay: float = 0.1
    embedding_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    checkpoints: Sequence[int] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    select: Callable[[str], bool] | None = None
    after: Callable[[nn.Module, int], object] | None = None
    training: bool = True
    optimiser: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    schedule: Callable[[int], float] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if self.schedule is not None:
            return self.schedule(step)
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        along = max(0.0, step - self.warmup) / max(1, self.steps - self.warmup)
        return (
            self.rate
            * rising
            * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, along))) / 2)
        )


def train(
    recipe: Recipe,
    folder: Path | None,
    *,
    seed: int,
    progress: Progress = silent,
    every: float = 30.0,
) -> Story:
    """Train `recipe.model` in place, keeping what a later call needs to go on in
    `folder/state.safetensors`.

    The trained model and its checkpoints are written to `folder/ready`. folder: None keeps and
    writes nothing. every: seconds between two states; whatever kills the process, no more is lost.
    Raises InputError for a `rates` or `select` that fits no parameter, ResultError for the state of
    another training, OSError when the folder cannot be written, ArithmeticError when the loss is no
    longer finite. torch's random state, the modules' training flags and the parameters' gradient
    flags are the same afterwards.
    """
    model = recipe.model
    with _restored(model), _random_state():
        _freeze(recipe)
        model.train(recipe.training)
        optimiser = optimiser_of(recipe)
        story = (checkpoint.read(folder, model, optimiser, seed) if folder else None) or Story()
        clock = _Clock(story)
        try:
            _steps(recipe, optimiser, story, clock, folder, seed, progress, every)
        except KeyboardInterrupt as interrupt:
            if folder:
                interrupt.add_note(
                    "The training can go on: its last half minute is lost, the rest is kept in "
                    f"{folder}."
                )
            raise
        if str(story.step) not in story.held_out:
            story.held_out[str(story.step)] = _judged(recipe)
        if folder and recipe.save:
            recipe.save(model.eval(), folder / "ready")
    clock.settle()
    return story


def _steps(
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    story: Story,
    clock: _Clock,
    folder: Path | None,
    seed: int,
    progress: Progress,
    every: float,
) -> None:
    """From where the story stands to the end."""
    stopped = False
    while True:
        if folder and story.step in recipe.checkpoints:
            _checkpoint(recipe, folder / "ready" / "checkpoints" / f"step-{story.step}", story)
        if stopped or story.step >= recipe.steps:
            return
        story.losses.append(_step(recipe, optimiser, story.step, seed))
        story.step += 1
        if recipe.after is not None:
            with torch.no_grad():
                stopped = recipe.after(recipe.model, story.step) is True
        last = stopped or story.step == recipe.steps
        if story.step % max(1, recipe.steps // 100) == 0 or last:
            story.curve.append([story.step, sum(story.losses) / len(story.losses)])
            story.losses = []
            progress(story.step, recipe.steps, f"loss {story.curve[-1][1]:.3f}")
        if folder and clock.read() > every and not last:
            clock.settle()
            checkpoint.write(folder, recipe.model, optimiser, story, seed)


def epoch_rows(n: int, size: int, step: int, seed: int) -> Tensor:
    """(size,) row numbers of this step's batch: each epoch is a fresh shuffle of all n rows, cut
    into batches."""
    if size > n:
        raise ValueError(f"a batch of {size} cannot be drawn from {n} rows")
    epoch, batch = divmod(step, n // size)
    return torch.randperm(n, generator=generator(seed, epoch))[batch * size : (batch + 1) * size]


def generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step of one run."""
    return torch.Generator().manual_seed(_mixed(seed, step))


def _mixed(seed: int, step: int) -> int:
    return (1_000_003 * seed + step + 1) % 2**32  # torch's CPU generator looks at 32 bits only


def optimiser_of(recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser that a training of this recipe begins with; a group's `times` is its share of
    the learning rate."""
    return (recipe.optimiser or _adamw)(_groups(recipe))


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def _groups(recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters of one kind together: how many times the learning rate they have, and their weight
    decay."""
    tables = {id(part.weight) for part in recipe.model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in recipe.model.named_parameters():
        if not value.requires_grad:
            continue
        times, decay = 1.0, recipe.decay if value.ndim >= 2 else 0.0
        if recipe.embedding_rate and id(value) in tables:
            times, decay = recipe.embedding_rate / recipe.rate, 0.0
        times *= next((by for words, by in recipe.rates.items() if re.search(words, name)), 1.0)
        groups.setdefault((times, decay), []).append(value)
    shared = {"lr": recipe.rate, "betas": recipe.betas}
    return [
        {"params": some, "times": times, "weight_decay": decay, **shared}
        for (times, decay), some in groups.items()
    ]


def _freeze(recipe: Recipe) -> None:
    """Turn gradients off where the recipe does not train; refuse words that fit no parameter."""
    names = [name for name, _ in recipe.model.named_parameters()]
    for words in recipe.rates:
        if not any(re.search(words, name) for name in names):
            raise InputError(
                f"no parameter has {words!r} in its name, which `rates` gives a learning rate; "
                f"there are {', '.join(names[:4])}, ..."
            )
    if recipe.select is not None:
        for name, value in recipe.model.named_parameters():
            value.requires_grad_(value.requires_grad and bool(recipe.select(name)))
    if not any(value.requires_grad for value in recipe.model.parameters()):
        raise InputError(
            f"there is nothing to train: of {len(names)} parameters `select` chooses none that "
            f"takes a gradient; there are {', '.join(names[:4])}, ..."
        )


def _step(recipe: Recipe, optimiser: torch.optim.Optimizer, step: int, seed: int) -> float:
    rate = recipe.rate_at(step)
    for group in optimiser.param_groups:
        group["lr"] = group["times"] * rate
    torch.manual_seed(_mixed(seed, step))  # for dropout
    with torch.enable_grad():
        loss = recipe.loss(recipe.model, step, generator(seed, step))
        if not math.isfinite(value := loss.item()):
            raise ArithmeticError(f"the loss of step {step} is {value}")
        loss.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(recipe.model.parameters(), recipe.clip)
    optimiser.step()
    optimiser.zero_grad()
    return value


def _checkpoint(recipe: Recipe, folder: Path, story: Story) -> None:
    story.held_out[str(story.step)] = _judged(recipe)
    if recipe.save:
        recipe.save(recipe.model.eval(), folder)
    recipe.model.train(recipe.training)


def _judged(recipe: Recipe) -> dict[str, float]:
    if recipe.judge is None:
        return {}
    recipe.model.eval()
    with torch.no_grad():
        numbers = {what: round(float(x), 4) for what, x in recipe.judge(recipe.model).items()}
    recipe.model.train(recipe.training)
    return numbers


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Training flags of the modules and gradient flags of the parameters are the same again
    afterwards; no gradient is left behind."""
    modes = [(part, part.training) for part in model.modules()]
    flags = [(value, value.requires_grad) for value in model.parameters()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for value, flag in flags:
            value.requires_grad_(flag)
            value.grad = None


def _random_state() -> contextlib.AbstractContextManager[None]:
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=cuda)


class _Clock:
    """Seconds of wall and of processor, added to the story when they are settled."""

    def __init__(self, story: Story) -> None:
        self.story, self.wall, self.cpu = story, time.monotonic(), time.process_time()

    def read(self) -> float:
        return time.monotonic() - self.wall

    def settle(self) -> None:
        self.story.seconds += time.monotonic() - self.wall
        self.story.cpu_seconds += time.process_time() - self.cpu
        self.wall, self.cpu = time.monotonic(), time.process_time()
