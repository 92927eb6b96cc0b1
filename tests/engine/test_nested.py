"""Every sweep inside every kind of outer change: packed cells equal whole runs, and both equal
plain PyTorch hooks.

Three references, from near to far: `naive` under the same outer change; the same method with
`sweep` replaced by `naive`; a copy of the Hugging Face model on which the outer change, and the
cell, are ordinary hooks written here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import (
    Intervention,
    ablate,
    add,
    clamped,
    intervene,
    knock_out,
    project_out,
    replaced,
    scaled,
)
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.engine.trace import trace

FAMILIES = ("llama", "gpt2", "gemma2")
CLEAN = [[3, 14, 15, 92, 65, 35, 89], [38, 46, 26, 43, 11]]
CORRUPT = [[5, 14, 15, 92, 61, 35, 7], [38, 47, 26, 44, 11]]
V = torch.linspace(-1.5, 2.0, 32)
W = torch.linspace(2.0, -1.0, 32).cos()
TOLERANCE = 1e-4


def metric(logits: Tensor, example: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, logits.shape[1]) + 0.1 * example[:, None].to(logits)
    return (logits * weight).sum(dim=1)


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

CELLS: list[Any] = [
    [],
    add("layers.0.resid_pre", W, positions=[3]),
    ablate("layers.0.mlp.out", positions=[4]),
    scaled("layers.1.mlp.out", -1.0, positions=-1),
    add("layers.1.resid_post", W, positions=[1]),
    replaced("layers.2.resid_post", V, positions=-1),
    add("layers.2.mlp.out", W, examples=[0]),
    [ablate("layers.0.attn.z", units=[0]), clamped("layers.1.resid_post", -0.3, 0.3, positions=-1)],
    knock_out(1, -1, [0]),
]


@cache
def plain(name: str) -> Tensor:
    return naive(tiny.lm(name), CLEAN, CELLS, metric)


# every change on one family; on the others those that meet other code (fused q, k, v; post-norms,
# windows, soft-caps)
ELSEWHERE = [
    *(
        "add at the last",
        "scale at the last",
        "ablate a head at 3",
        "clamp neurons",
        "keys and values",
        "nested",
    ),
    *("a value for each", "weights", "pattern", "final norm", "a hook"),
]


@pytest.mark.parametrize(
    ("name", "outer"),
    [(FAMILIES[0], o) for o in OUTER] + [(n, o) for n in FAMILIES[1:] for o in ELSEWHERE],
)
def test_cells_equal_their_naive_runs_inside_an_outer_change(name: str, outer: str) -> None:
    lm = tiny.lm(name)
    with OUTER[outer](lm):
        told, got, expected = (
            plan(lm, CLEAN, CELLS),
            sweep(lm, CLEAN, CELLS, metric),
            naive(lm, CLEAN, CELLS, metric),
        )
    assert tiny.gap(got, expected) < TOLERANCE
    assert tiny.gap(expected, plain(name)) > 20 * TOLERANCE, (
        "the outer change changed nothing: the test would see nothing"
    )
    # the empty cell is skipped where others are packed, and the knock-out always runs whole
    assert told.naive == (2 if outer in PACKED else 2 * len(CELLS))


def _edited(
    module: nn.Module, change: Callable[[Tensor], None], stack: ExitStack, *, enters: bool = False
) -> None:
    """A plain hook that changes a copy of what a module gives, or of what it takes."""

    def before(_: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        change(x)
        return (x, *args[1:])

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        change(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    made = (
        module.register_forward_pre_hook(before) if enters else module.register_forward_hook(after)
    )
    stack.callback(made.remove)


def _parts(model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A layer, its output projection of heads, and the module that gives mlp.out."""
    if hasattr(model, "transformer"):
        block = model.transformer.h[layer]
        return block, block.attn.c_proj, block.mlp
    block = model.model.layers[layer]
    return block, block.self_attn.o_proj, getattr(block, "post_feedforward_layernorm", block.mlp)


def _at(position: int, value: Tensor) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x[:, position] += value

    return change


def _off(x: Tensor) -> None:
    x[..., 16:24] = 0  # head 2 of 4, 8 wide


BY_HAND: dict[str, tuple[Intervention, int, Callable[[Tensor], None]]] = {
    "stream at 3": (add("layers.1.resid_post", V, positions=[3]), 0, _at(3, V)),
    "stream at the last": (add("layers.1.resid_post", V, positions=-1), 0, _at(-1, V)),
    "a head": (ablate("layers.1.attn.z", units=[2]), 1, _off),
    "MLP at 3": (add("layers.1.mlp.out", V, positions=[3]), 2, _at(3, V)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_cells_inside_an_outer_change_equal_plain_hooks(name: str) -> None:
    lm, prompt = tiny.lm(name), [CLEAN[0]]
    model = deepcopy(lm.model)
    cells = [
        add("layers.0.resid_post", W, positions=[4]),
        add("layers.1.resid_post", W, positions=[3]),
    ]
    for change, part, by_hand in BY_HAND.values():
        with intervene(lm, change):
            got = sweep(lm, prompt, cells, metric)[:, 0]
        for number, (layer, position) in enumerate(((0, 4), (1, 3))):
            with ExitStack() as stack, torch.no_grad():
                _edited(_parts(model, 1)[part], by_hand, stack, enters=part == 1)
                _edited(_parts(model, layer)[0], _at(position, W), stack)
                true = metric(
                    model(torch.tensor(prompt)).logits[:, -1], torch.zeros(1, dtype=torch.long)
                )
            assert abs(float(got[number] - true[0])) < TOLERANCE * max(1.0, float(true.abs())), (
                change
            )


@pytest.mark.parametrize("outer", ["nothing", "add at 3", "knock out"])
def test_an_outer_trace_sees_the_base_run_once(outer: str) -> None:
    """Neither packed rows nor second passes; and it sees them inside other changes as well."""
    lm = tiny.lm("llama")
    with ExitStack() as stack, OUTER[outer](lm) if outer in OUTER else ExitStack():
        with trace(lm, "layers.1.resid_post", "layers.1.attn.k") as alone:
            lm(CLEAN)
        seen = stack.enter_context(trace(lm, "layers.1.resid_post", "layers.1.attn.k"))
        inside = sweep(lm, CLEAN, CELLS, metric)
        stack.close()
        outside = sweep(lm, CLEAN, CELLS, metric)
    for site in ("layers.1.resid_post", "layers.1.attn.k"):
        assert len(seen.steps(site)) == 1
        torch.testing.assert_close(seen[site], alone[site])
    assert tiny.gap(inside, outside) < TOLERANCE


def test_a_hook_of_every_module_is_foreign_too() -> None:
    lm = tiny.lm("llama")

    def move(module: nn.Module, args: tuple, output: Any) -> Any:
        if module is lm.layout.layers[""][1].mlp:
            output = output.clone()
            output[:, 3] += V
        return output

    handle = nn.modules.module.register_module_forward_hook(move)
    try:
        got, expected = sweep(lm, CLEAN, CELLS, metric), naive(lm, CLEAN, CELLS, metric)
    finally:
        handle.remove()
    assert tiny.gap(got, expected) < TOLERANCE
    assert tiny.gap(got, sweep(lm, CLEAN, CELLS, metric)) > 1e-2
