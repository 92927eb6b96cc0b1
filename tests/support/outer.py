"""Changes of every kind that a user may have at work around a measure: interventions, an edit, a
hook of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import (
    Intervention,
    ablate,
    add,
    clamped,
    intervene,
    knock_out,
    largest,
    permuted,
    project_out,
    replaced,
    scaled,
)

FAMILIES = ("llama", "gpt2", "gemma2")
CLEAN = [[3, 14, 15, 92, 65, 35, 89], [38, 46, 26, 43, 11]]
CORRUPT = [[5, 14, 15, 92, 61, 35, 7], [38, 47, 26, 44, 11]]
V = torch.linspace(-1.5, 2.0, 32)
W = torch.linspace(2.0, -1.0, 32).cos()


@contextmanager
def hooked(lm: Any) -> Any:
    """A user's own forward hook: it moves position 3, whatever stands there."""

    def move(module: nn.Module, args: tuple, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, 3] += V
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = lm.layout.layers[""][1].register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _made(*changes: Intervention) -> Callable[[Any], AbstractContextManager]:
    return lambda lm: intervene(lm, *changes)


def _delta(lm: Any) -> Edit:
    name, weight = next(
        (n, p) for n, p in lm.model.named_parameters() if ".1." in n and p.ndim == 2
    )
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return Edit(lm, [add("layers.0.resid_post", V, positions=-1)], {name: 0.1 * noise})


@contextmanager
def _several(lm: Any) -> Any:
    with (
        intervene(lm, scaled("layers.1.mlp.out", 2.0), add("layers.0.mlp.out", V, positions=[3])),
        intervene(
            lm, add("layers.1.mlp.out", W, positions=-1), clamped("layers.1.mlp.out", -0.4, 0.5)
        ),
    ):
        yield


EACH = torch.stack([V, W])[:, None]  # another vector for each example
PACKED: dict[str, Callable[[Any], AbstractContextManager]] = {
    "add everywhere": _made(add("layers.1.resid_post", V)),
    "add at the last": _made(add("layers.1.resid_post", V, positions=-1)),
    "add at 3": _made(add("layers.0.resid_post", V, positions=[3])),
    "add below": _made(
        add("layers.0.resid_pre", V, positions=[3]), add("layers.1.resid_pre", W, positions=-1)
    ),
    "scale at the last": _made(scaled("layers.1.attn.out", -2.0, positions=-1)),
    "ablate a head": _made(ablate("layers.1.attn.z", units=[2])),
    "ablate a head at 3": _made(ablate("layers.1.attn.z", units=[-1], positions=[3])),
    "clamp at the last": _made(clamped("layers.1.mlp.out", -0.1, 0.1, positions=-1)),
    "clamp neurons": _made(clamped("layers.*.mlp.act", 0.3, 0.3, units=[1, 5], positions=-1)),
    "project out at 3": _made(project_out("layers.1.resid_post", V, positions=[3])),
    "project out everywhere": _made(project_out("layers.*.resid_post", torch.stack([V, W]))),
    "keys and values": _made(
        scaled("layers.1.attn.k", 2.0, positions=[1]), add("layers.2.attn.v", 0.7, units=[0])
    ),
    "the largest neurons": _made(largest("layers.*.mlp.act", 7), largest("layers.1.attn.z", 3)),
    "keys in another order": _made(
        permuted("layers.*.attn.k", torch.tensor([[2, 0, 1, 3, 7, 5, 6, 4]]))
    ),
    "queries of the last layer": _made(scaled("layers.2.attn.q", 3.0, positions=-1)),
    "one example": _made(add("layers.1.resid_post", V, examples=[1], positions=[-1])),
    "a value for each": _made(add("layers.1.mlp.out", EACH, positions=-1)),
    "places of their own": _made(replaced("layers.1.resid_post", V, positions=[[3, 1], [0, 4]])),
    "embedding": _made(add("embed", V, positions=[3])),
    "weights": _delta,
    "nested": _several,
}
WHOLE: dict[str, Callable[[Any], AbstractContextManager]] = {
    "knock out": _made(knock_out("*", -1, [1, 2])),
    "pattern": _made(scaled("layers.1.attn.pattern", -3.0, units=[1])),
    "final norm": _made(scaled("final_norm", 1.5, positions=-1)),
    "logits": _made(add("logits", torch.linspace(-3, 3, 96), examples=[0], positions=-1)),
    "a hook": hooked,
}
OUTER = PACKED | WHOLE
