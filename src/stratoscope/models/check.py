"""What a proof is made of: a pair of tensors that must be equal, and the check of how far they are
apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.models.taps import StopForward

Pair = tuple[str, Site, Tensor, Tensor]  # an invariant, its place, what it says, what the model has


@dataclass(frozen=True)
class Check:
    """One invariant at one place: largest absolute difference (over the largest value) and relative
    norm."""

    name: str
    place: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.absolute <= self.tolerance and self.relative <= self.tolerance


def gap(name: str, place: Site, got: Tensor, expected: Tensor, tolerance: float) -> Check:
    """How far `got` is from `expected`: of its largest value, and of its norm. What is not a number
    fails."""
    missed, scale = (got - expected).float(), expected.float()
    absolute = float(missed.abs().max() / scale.abs().max().clamp_min(1e-6))
    relative = float(missed.norm() / scale.norm().clamp_min(1e-6))
    return Check(name, str(place), absolute, relative, tolerance)


def fact(name: str, place: Site, holds: bool, tolerance: float) -> Check:
    error = 0.0 if holds else torch.inf
    return Check(name, str(place), error, error, tolerance)


def stop(x: Tensor, run: Run) -> None:
    """A reader that ends the pass: what comes later is not needed."""
    raise StopForward
