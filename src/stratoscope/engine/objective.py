"""From an objective's two functions to a trained model: by our own loop, or by Transformers'
Trainer.

An objective is a module with `batch(rows, tokenizer, generator)`: what the model is shown and what
it is asked, all chance from `generator`; and `loss(model, batch)`: named scalars, of which "loss"
is made small and "targets" says over how many targets it is the mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stratoscope.engine.progress import shown
from stratoscope.engine.train import Recipe, epoch_rows, generator, optimiser_of, train
from stratoscope.errors import InputError, ResultError
from stratoscope.models.lm import LM
from stratoscope.store import hub
from stratoscope.store.cache import cache_root


@runtime_checkable
class Objective(Protocol):
    """A module of `training/`."""

    @property
    def batch(self) -> Callable[..., dict[str, Tensor]]: ...

    @property
    def loss(self) -> Callable[..., dict[str, Tensor]]: ...


def fit(
    objective: Objective,
    lm: LM,
    rows: Sequence[Any],
    *,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoints: Sequence[int] = (),
    held_out: Sequence[Any] = (),
) -> Path:
    """Train a copy of the model, and give its folder, which `stratoscope.load` reads.

    folder: where it goes; None: the cache, in a folder named by all that makes this fit. Beside the
    model stand `checkpoints/step-N` (also Hugging Face folders) and `card.json`: settings, curve,
    losses on `held_out`. A call that was killed is taken up by the same call, and ends in the same
    bits. Raises InputError for fewer rows than a batch and for a loss that stops being a number,
    ResultError for a folder that holds something else.
    """
    _refuse(rows, steps, batch_size)
    settings = {"steps": steps, "rate": rate, "batch_size": batch_size, "seed": seed}
    settings |= {"checkpoints": list(checkpoints), "objective": _name(objective)}
    weights = str(lm.provenance["weights"])
    origin = _digest(settings, weights, rows, held_out)
    place = (
        Path(folder) if folder else cache_root() / "trained" / f"{_name(objective)}-{origin[:8]}"
    )
    if _is_done(place, origin):
        return place
    training = _workshop(place, origin)
    recipe = replace(
        recipe_of(objective, lm, rows, steps=steps, rate=rate, batch_size=batch_size, seed=seed),
        judge=lambda model: _held_out(objective, lm, model, held_out, batch_size),
        save=lambda model, to: _save(lm, model, to),
        checkpoints=checkpoints,
    )
    with hub.quiet(), shown(f"training {_name(objective)}") as progress:
        try:
            story = train(recipe, training, seed=seed, progress=progress)
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {rate}.") from error
    card = {"origin": origin, "settings": settings, "model": lm.provenance, "rows": len(rows)}
    card |= {"held_out": story.held_out, "curve": story.curve, "seconds": round(story.seconds, 1)}
    (training / "ready" / "card.json").write_text(json.dumps(card, indent=2, default=str) + "\n")
    os.replace(training / "ready", place)
    shutil.rmtree(training)
    return place


def recipe_of(
    objective: Objective,
    lm: LM,
    rows: Sequence[Any],
    *,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> Recipe:
    """The recipe of a copy of the model: step by step the next rows of a shuffle, epoch after
    epoch. To be changed by `dataclasses.replace` where an objective needs more."""

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        chosen = [rows[i] for i in epoch_rows(len(rows), batch_size, step, seed).tolist()]
        return objective.loss(model, _shown(objective, lm, chosen, generator))["loss"]

    return Recipe(
        deepcopy(lm.model),
        loss,
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        warmup=max(1, steps // 20),
    )


def as_trainer(objective: Objective, lm: LM, rows: Sequence[Any], arguments: Any) -> Any:
    """A `transformers.Trainer` of a copy of the model with the same batches, loss, optimiser and
    rates as `fit`: for several GPUs, accumulation, and whatever else the Trainer does.

    arguments: `transformers.TrainingArguments`; its max_steps, learning_rate, seed,
    per_device_train_batch_size and max_grad_norm say what `fit` is told by its options. Chance
    inside `batch` is seeded by the call's number. Raises InputError without max_steps.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    steps, size = arguments.max_steps, arguments.per_device_train_batch_size
    _refuse(rows, steps, size)
    recipe = recipe_of(
        objective,
        lm,
        rows,
        steps=steps,
        rate=arguments.learning_rate,
        batch_size=size,
        seed=arguments.seed,
    )
    optimiser = optimiser_of(recipe)
    factors = [lambda step: recipe.rate_at(step) / recipe.rate] * len(optimiser.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factors)
    order = _Order(rows, size, steps * arguments.gradient_accumulation_steps, arguments.seed)

    class Ours(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(order)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            losses = objective.loss(model, inputs)
            return (losses["loss"], losses) if return_outputs else losses["loss"]

    calls = iter(range(2**62))

    def collate(chosen: Sequence[Any]) -> dict[str, Tensor]:
        return objective.batch(chosen, lm.tokenizer, generator(arguments.seed, next(calls)))

    trainer = Ours(
        recipe.model,
        replace(arguments, remove_unused_columns=False),
        collate,
        order,
        optimizers=(optimiser, schedule),
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are averaged
    return trainer


class _Order:
    """The rows of every step, one after the other, as `fit` meets them: a data set of one epoch."""

    def __init__(self, rows: Sequence[Any], size: int, steps: int, seed: int) -> None:
        self.rows, self.size, self.steps, self.seed = rows, size, steps, seed

    def __len__(self) -> int:
        return self.steps * self.size

    def __getitem__(self, index: int) -> Any:
        step, place = divmod(index, self.size)
        return self.rows[int(epoch_rows(len(self.rows), self.size, step, self.seed)[place])]


def rows_of(inputs: Any) -> list[Any]:
    """Texts, rows of ids, a `datasets.Dataset` or any iterable of rows, as a list. Raises
    InputError when there are none."""
    if isinstance(inputs, Tensor):
        inputs = inputs.tolist()
    rows = [inputs] if isinstance(inputs, str) else list(inputs)
    if not rows:
        raise InputError("there is nothing to train on: give at least one row.")
    return rows


def _refuse(rows: Sequence[Any], steps: int, batch_size: int) -> None:
    if steps < 1 or not 1 <= batch_size <= len(rows):
        raise InputError(
            f"steps={steps} of {batch_size} rows, out of {len(rows)}: one step at least, and a "
            "batch no larger than what there is."
        )


def _shown(
    objective: Objective, lm: LM, rows: Sequence[Any], generator: torch.Generator
) -> dict[str, Tensor]:
    made = objective.batch(rows, lm.tokenizer, generator)
    return {name: value.to(lm.model.device) for name, value in made.items()}


def _held_out(
    objective: Objective, lm: LM, model: nn.Module, rows: Sequence[Any], size: int
) -> dict[str, float]:
    """The mean of each named scalar over the targets of all held-out rows."""
    sums: dict[str, float] = {}
    for number, start in enumerate(range(0, len(rows), size)):
        part = _shown(objective, lm, rows[start : start + size], generator(0, number))
        values = {name: float(x) for name, x in objective.loss(model, part).items()}
        for name, value in values.items():
            by = 1.0 if name == "targets" else values["targets"]
            sums[name] = sums.get(name, 0.0) + by * value
    return {name: x if name == "targets" else x / sums["targets"] for name, x in sums.items()}


def _save(lm: LM, model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    for part in (lm.tokenizer, lm.processor):
        if part is not None:
            part.save_pretrained(folder)


# --- where a fit is kept, and what makes it that fit ----------------------------------------------


def _name(objective: Any) -> str:
    return objective.__name__.rpartition(".")[2]


def _digest(
    settings: Mapping[str, Any], weights: str, rows: Sequence[Any], held_out: Sequence[Any]
) -> str:
    digest = hashlib.sha256(json.dumps([settings, weights], sort_keys=True).encode())
    for part in _parts([list(rows), list(held_out)]):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of rows of texts, numbers and tensors, each with what kind it is."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield from _parts([[name, value[name]] for name in sorted(value)])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{type(value).__name__}:{value!r}\0".encode()


def _is_done(place: Path, origin: str) -> bool:
    """Raises ResultError for a folder with something else in it."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    card = place / "card.json"
    if card.is_file() and json.loads(card.read_text("utf-8")).get("origin") == origin:
        return True
    raise ResultError(
        f"{place} holds something else (other rows, settings or weights): give another folder, or "
        "delete it."
    )


def _workshop(place: Path, origin: str) -> Path:
    """The folder beside `place` in which this fit goes on; one of another fit is refused."""
    training = place.with_name(f".{place.name}.training")
    (training / "ready").mkdir(parents=True, exist_ok=True)
    mark = training / "origin"
    if mark.is_file() and mark.read_text("utf-8") != origin:
        raise ResultError(
            f"{training} holds another fit, half done (other rows, settings or weights): repeat "
            "that one, give another folder, or delete it."
        )
    mark.write_text(origin, "utf-8")
    return training
