"""What a training needs to go on: one safetensors file of weights, buffers and moments, and its
story so far in the header.

A kill at any moment leaves the last complete state.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.errors import LoadError, ResultError
from stratoscope.store import tensors as files


@dataclass
class Story:
    """What happened so far; kept with the weights, and printed on the card."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resumed: int = 0
    # [step, mean training loss since the last entry]
    curve: list[list[Any]] = field(default_factory=list)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)  # by step
    losses: list[float] = field(default_factory=list)  # since the last entry of the curve


def write(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, story: Story, seed: int
) -> None:
    """Replace `folder/state.safetensors` by what stands now."""
    tensors = _own(model) | {
        f"moment {what} {name}": value
        for name, parameter in _named(model, optimiser)
        for what, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    folder.mkdir(parents=True, exist_ok=True)
    about = {"story": vars(story), "seed": seed}
    files.write(folder / "state.safetensors", tensors, kind="training", about=about)


def read(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, seed: int
) -> Story | None:
    """Put the kept numbers back into model and optimiser; None, and both untouched, when none are
    kept. Raises ResultError when they belong to another training."""
    path = folder / "state.safetensors"
    with suppress(LoadError):
        saved, about = files.read(path, kind="training")
        _refuse_another(path, model, saved, about["seed"], seed)
        with torch.no_grad():
            for name, value in _own(model).items():
                value.copy_(saved[name])
        own = dict(_named(model, optimiser))
        numbers = {name: number for number, name in enumerate(own)}
        moments: dict[int, dict[str, Tensor]] = {}  # a parameter without a gradient so far has none
        for words in (words for words in saved if words.startswith("moment ")):
            _, what, name = words.split(" ")
            moments.setdefault(numbers[name], {})[what] = _laid_out(saved[words], own[name])
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": moments, "param_groups": groups})
        story = Story(**about["story"])
        story.resumed += 1
        return story
    return None


def _laid_out(moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment as its parameter lies in memory: fused steps take both element by element."""
    if moment.shape != parameter.shape:
        return moment  # the number of steps
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _refuse_another(
    path: Path, model: nn.Module, saved: dict[str, Tensor], kept_seed: int, seed: int
) -> None:
    shapes = {name: tuple(value.shape) for name, value in _own(model).items()}
    there = {name: tuple(v.shape) for name, v in saved.items() if not name.startswith("moment ")}
    different = sorted(name for name in shapes | there if shapes.get(name) != there.get(name))
    if different or kept_seed != seed:
        what = (
            f"{different[0]} is {there.get(different[0], 'absent')} there and "
            f"{shapes.get(different[0], 'absent')} here"
            if different
            else f"its seed is {kept_seed}, not {seed}"
        )
        raise ResultError(
            f"{path} holds another training: {what}. Give another folder, or delete this one."
        )


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied weights once."""
    own = {f"parameter {name}": value.detach() for name, value in model.named_parameters()}
    return own | {f"buffer {name}": value for name, value in model.named_buffers()}


def _named(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The optimiser's parameters in its own order, each with its name in the model."""
    names = {value: name for name, value in model.named_parameters()}
    return [(names[value], value) for group in optimiser.param_groups for value in group["params"]]
