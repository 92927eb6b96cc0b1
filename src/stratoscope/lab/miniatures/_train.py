"""The one loop that trains every miniature: deterministic by seed, resumable bit for bit, safe to
interrupt.

A miniature's file says what is learned, as a `Recipe`; `train` learns it. The data of a step are a
pure function of (seed, step): `loss(model, step, generator)` draws them with `generator`, a
generator seeded anew for each step, or asks `epoch_rows` for its share of a shuffled data set.
Dropout is seeded by the step as well. So nothing but the weights, the optimiser's moments and the
step must be kept, and a resumed run continues as if it had never stopped.

Every 30 seconds they go into `state.safetensors` (tensors, and a JSON header with step, curve and
seconds), written beside and moved in one step: whenever the process ends, at most 30 seconds are
lost. A run on another number of threads is as good, but sums in another order: its weights differ
in the last bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Progress = Callable[[int, int, str], object]  # steps done, steps in all, a few words


@dataclass(frozen=True)
class Recipe:
    """What a miniature learns. The learning rate rises for `warmup` steps, then falls as a cosine
    to `floor * rate`.

    model: with fresh weights. loss(model, step, generator): the mean loss of this step's batch.
    save(model, folder): writes an ordinary Hugging Face folder, tokenizer included. judge(model):
    held-out numbers for the card, called without gradients, in evaluation mode; must draw no random
    number it does not seed. checkpoints: steps whose weights are kept in `checkpoints/step-N` (0:
    untrained). decay: weight decay, of matrices only. embedding_rate: of embeddings, which then do
    not decay; None: as other matrices. A token that is met once in a thousand is moved as rarely,
    where every token moves a matrix. data: for the card, corpus by corpus, where it comes from.
    notes: what a reader of the card must know.
    """

    model: nn.Module
    loss: Callable[[nn.Module, int, torch.Generator], Tensor]
    save: Callable[[nn.Module, Path], object]
    judge: Callable[[nn.Module], dict[str, float]]
    steps: int
    rate: float
    warmup: int = 50
    floor: float = 0.1
    decay: float = 0.1
    embedding_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    checkpoints: Sequence[int] = ()
    data: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        along = max(0.0, step - self.warmup) / max(1, self.steps - self.warmup)
        return (
            self.rate
            * rising
            * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, along))) / 2)
        )


@dataclass
class Story:
    """What happened so far; kept with the weights, and printed on the card."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumed: int = 0
    curve: list[list[Any]] = field(
        default_factory=list
    )  # [step, mean training loss since the last entry]
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)  # by step
    losses: list[float] = field(default_factory=list)  # since the last entry of the curve


def train(
    recipe: Recipe, workshop: Path, *, seed: int, progress: Progress, every: float = 30.0
) -> Story:
    """Train `recipe.model` in place, keeping what a later call needs to go on in
    `workshop/state.safetensors`.

    The trained model and its checkpoints are written to `workshop/ready`. every: seconds between
    two states. Raises OSError when the workshop cannot be written, ArithmeticError when the loss is
    no longer finite. torch's random state is the same afterwards.
    """
    model, ready = recipe.model.train(), workshop / "ready"
    optimiser = torch.optim.AdamW(_groups(recipe), lr=recipe.rate, betas=recipe.betas, fused=True)
    story = _restore(workshop, model, optimiser) or Story()
    clock = _Clock(story)
    try:
        with torch.random.fork_rng(devices=[]):
            while True:
                if story.step in recipe.checkpoints:
                    _checkpoint(recipe, ready / "checkpoints" / f"step-{story.step}", story)
                if story.step >= recipe.steps:
                    break
                story.losses.append(_step(recipe, optimiser, story.step, seed))
                story.step += 1
                if story.step % max(1, recipe.steps // 100) == 0 or story.step == recipe.steps:
                    story.curve.append([story.step, sum(story.losses) / len(story.losses)])
                    story.losses = []
                    progress(story.step, recipe.steps, f"loss {story.curve[-1][1]:.3f}")
                if clock.read() > every and story.step < recipe.steps:
                    clock.settle()
                    _keep(workshop, model, optimiser, story)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            f"The training can go on: its last half minute is lost, the rest is kept in {workshop}."
        )
        raise
    if str(story.step) not in story.held_out:
        story.held_out[str(story.step)] = _judged(recipe)
    recipe.save(model.eval(), ready)
    clock.settle()
    return story


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


def _groups(recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices, embeddings and vectors: how many times the learning rate they have, and their
    weight decay."""
    tables = {id(part.weight) for part in recipe.model.modules() if isinstance(part, nn.Embedding)}
    learned = [p for p in recipe.model.parameters() if p.requires_grad]
    apart = [p for p in learned if id(p) in tables] if recipe.embedding_rate else []
    matrices = [p for p in learned if p.ndim >= 2 and not any(p is other for other in apart)]
    kinds = [
        (matrices, 1.0, recipe.decay),
        (apart, (recipe.embedding_rate or recipe.rate) / recipe.rate, 0.0),
        ([p for p in learned if p.ndim < 2], 1.0, 0.0),
    ]
    return [
        {"params": some, "times": times, "weight_decay": decay}
        for some, times, decay in kinds
        if some
    ]


def _step(recipe: Recipe, optimiser: torch.optim.Optimizer, step: int, seed: int) -> float:
    for group in optimiser.param_groups:
        group["lr"] = group["times"] * recipe.rate_at(step)
    torch.manual_seed(_mixed(seed, step))  # for dropout
    loss = recipe.loss(recipe.model, step, generator(seed, step))
    if not math.isfinite(value := loss.item()):
        raise ArithmeticError(f"the loss of step {step} is {value}")
    loss.backward()
    nn.utils.clip_grad_norm_(recipe.model.parameters(), recipe.clip)
    optimiser.step()
    optimiser.zero_grad()
    return value


def _checkpoint(recipe: Recipe, folder: Path, story: Story) -> None:
    story.held_out[str(story.step)] = _judged(recipe)
    recipe.save(recipe.model.eval(), folder)
    recipe.model.train()


def _judged(recipe: Recipe) -> dict[str, float]:
    recipe.model.eval()
    with torch.no_grad():
        numbers = {
            what: round(float(value), 4) for what, value in recipe.judge(recipe.model).items()
        }
    recipe.model.train()
    return numbers


# --- the state that a later call goes on from -----------------------------------------------------


def _tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every number that the next step depends on, by name; tied weights once."""
    own = {f"parameter {name}": value.detach() for name, value in model.named_parameters()}
    own |= {f"buffer {name}": value for name, value in model.named_buffers()}
    names = {value: name for name, value in model.named_parameters()}
    moments = {
        f"moment {what} {names[parameter]}": value
        for parameter, state in optimiser.state.items()
        for what, value in state.items()
    }
    return own | moments


def _keep(workshop: Path, model: nn.Module, optimiser: torch.optim.Optimizer, story: Story) -> None:
    tensors = {name: value.contiguous() for name, value in _tensors(model, optimiser).items()}
    beside = workshop / "state.part"
    save_file(tensors, beside, {"story": json.dumps(vars(story))})
    os.replace(beside, workshop / "state.safetensors")


def _restore(workshop: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> Story | None:
    """Put the kept numbers back into model and optimiser; None, and both untouched, when none are
    kept."""
    with (
        suppress(SafetensorError, FileNotFoundError),
        safe_open(workshop / "state.safetensors", "pt") as state,
    ):
        kept = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118  (no mapping: cannot be iterated)
        story = Story(**json.loads(state.metadata()["story"]))
        with torch.no_grad():
            for name, value in _tensors(model, optimiser).items():
                value.copy_(kept[name])
        names = {value: name for name, value in model.named_parameters()}
        for parameter in (
            parameter for group in optimiser.param_groups for parameter in group["params"]
        ):
            optimiser.state[parameter] = {
                what: kept[f"moment {what} {names[parameter]}"]
                for what in ("step", "exp_avg", "exp_avg_sq")
                if f"moment {what} {names[parameter]}"
                in kept  # a parameter that had no gradient yet has none
            }
        story.resumed += 1
        return story
    return None


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
