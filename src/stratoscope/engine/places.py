"""Where a dictionary reads: any site, and what an MLP reads, which is no site of its own.

    layers.8.mlp.in      what goes into the module that makes `mlp.pre`: the stream after the MLP's
                         norm, (example, position, dim). It can be read, and not changed.

A layer without neurons (a mixture of experts) has no such place. SAELens and circuit-tracer call it
`blocks.8.mlp.hook_in`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Hook

_NAME = re.compile(r"(.*\b)mlp\.in")


@dataclass(frozen=True)
class MLPInput:
    """What the MLP reads that makes `pre`."""

    pre: Site

    def __str__(self) -> str:
        return str(self.pre).removesuffix("pre") + "in"


Place = Site | MLPInput


def places(lm: LM, names: Iterable[str]) -> list[Place]:
    """The places that names mean, sites first. Raises SiteError for one that the model lacks."""
    given = list(names)
    matched = {name: _NAME.fullmatch(name) for name in given}
    plain = [name for name in given if matched[name] is None]
    found: list[Place] = [*lm.layout.resolve(plain)] if plain else []
    for match in matched.values():
        if match is not None:
            found += [MLPInput(site) for site in lm.layout.resolve(f"{match[1]}mlp.pre")]
    return found


def place(lm: LM, name: str) -> Place:
    """The one place that a name means. Raises SiteError, also for a name with `*`."""
    match = _NAME.fullmatch(name)
    if match is None:
        return lm.layout.resolve_one(name)
    return MLPInput(lm.layout.resolve_one(f"{match[1]}mlp.pre"))


@contextmanager
def heard(lm: LM, at: MLPInput, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block `read` is shown what the MLP reads, in whatever shape the module takes it
    (..., dim)."""
    module, point = lm.layout.locate(at.pre)
    if point.where != "output":
        raise InputError(f"what makes `{at.pre}` on {lm.family.name} is no module of its own.")

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        read(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

    handle = module.register_forward_pre_hook(Hook(lm.taps, hook), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def seen(lm: LM, inputs: Any, *at: Place) -> dict[Place, Tensor]:
    """One forward pass up to the last of the places: what stands at each, heads side by side,
    (example, position, width). Raises as `capture` does."""
    batch = lm.batch(inputs)
    sites = dict.fromkeys(one.pre if isinstance(one, MLPInput) else one for one in at)
    inputs_of: dict[Place, Tensor] = {}
    with ExitStack() as listening:
        for one in at:
            if isinstance(one, MLPInput):
                keep = partial(_keep, inputs_of, one)
                listening.enter_context(heard(lm, one, keep))
        found = capture(lm, batch, *sites)
    for one, x in inputs_of.items():
        inputs_of[one] = x.reshape(*found[one.pre].shape[:2], x.shape[-1])
    return {one: inputs_of[one] if one in inputs_of else found[one].flatten(2) for one in at}


def _keep(inputs_of: dict[Place, Tensor], one: Place, x: Tensor) -> None:
    inputs_of[one] = x.detach().clone()
