"""Every sweep inside every kind of outer change: packed cells equal whole runs, and both equal
plain PyTorch hooks.

Three references, from near to far: `naive` under the same outer change; the same method with
`sweep` replaced by `naive`; a copy of the Hugging Face model on which the outer change, and the
cell, are ordinary hooks written here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratoscope.engine.intervene import (
    Intervention,
    ablate,
    add,
    clamped,
    intervene,
    knock_out,
    replaced,
    scaled,
)
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.engine.trace import trace
from support import tiny
from support.outer import CLEAN, FAMILIES, OUTER, PACKED, V, W

TOLERANCE = 1e-4


def metric(logits: Tensor, example: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, logits.shape[1]) + 0.1 * example[:, None].to(logits)
    return (logits * weight).sum(dim=1)


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
