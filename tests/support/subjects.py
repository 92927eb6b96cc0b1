"""What the tests of methods share: tiny models, padded inputs, and a guard that
nothing is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stratoscope.models import LM, wrap
from support import tiny

ROWS = [[3, 14, 15, 92, 65, 35, 89, 79], [38, 46, 26, 43, 3]]
CORRUPT = [[3, 14, 77, 92, 65, 35, 80, 79], [38, 11, 26, 43, 3]]
THREE = ("llama", "gpt2", "gemma2")


def lm_of(name: str) -> LM:
    """A tiny random model, wrapped without a tokenizer; padding token 0."""
    return wrap(tiny.model(name))


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    """Model inputs as a tokenizer would pad them, one column wider than it must be."""
    width = max(map(len, rows)) + 1
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def parts(lm: LM, layer: int) -> tuple[nn.Module, nn.Module]:
    """The output projections of attention and MLP, by Hugging Face's own names."""
    if lm.family.name == "gpt2":
        block = lm.model.transformer.h[layer]
        return block.attn.c_proj, block.mlp.c_proj
    block = lm.model.model.layers[layer]
    return block.self_attn.o_proj, block.mlp.down_proj


@torch.no_grad()
def entering(lm: LM, module: nn.Module, row: list[int]) -> Tensor:
    """What a module is given, by a plain hook: (position, ...)."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    lm.model(torch.tensor([row]))
    hook.remove()
    return seen[0]


@torch.no_grad()
def logits_with(
    lm: LM, module: nn.Module, row: list[int], change: Callable[[Tensor], None]
) -> Tensor:
    """Last logits when `change` has written into what the module is given, by a plain hook:
    (vocab,)."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        change(x[0])
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    logits = lm.model(torch.tensor([row])).logits[0, -1]
    handle.remove()
    return logits


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Equal within `tolerance` absolutely, and of the norm of what is expected; NaN only where NaN
    is expected."""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    gap = np.nan_to_num(found - expected)
    assert abs(gap).max() < tolerance
    assert np.linalg.norm(gap) < tolerance * np.linalg.norm(np.nan_to_num(expected))


def _hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


@contextmanager
def untouched(lm: LM) -> Iterator[None]:
    """Weights, hooks, training mode, gradients, attention kernel, generator and logits are the same
    after the block."""
    model = lm.model
    ids = torch.tensor([ROWS[1]]) % lm.dims.vocab

    @torch.no_grad()
    def state() -> tuple[list[Tensor], Any]:
        flags = [module.training for module in model.modules()] + [
            p.requires_grad for p in model.parameters()
        ]
        others = (
            _hooks(model),
            flags,
            model.config.to_json_string(),
            model.config._attn_implementation,
        )
        return [torch.get_rng_state(), *(x.clone() for x in model.state_dict().values())], others

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids).logits

    logits, (tensors, others) = run(), state()
    yield
    after, others_after = state()
    assert all(map(torch.equal, tensors, after))
    assert others == others_after
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits, run())
