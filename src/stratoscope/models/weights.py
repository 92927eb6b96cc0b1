"""What a module's weight is: one matrix (out, in), whichever way the module stores it.

A plain Linear, Conv1D or Embedding holds its matrix. Any other module that is linear in its input
(quantised, with an adapter that is not merged, with a scale of its own) is asked for it: its
columns are its answers to the unit vectors. So neither a scale nor an adapter can be forgotten, and
no library of quantisation is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.errors import FamilyError

_PLAIN = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)
_ROWS = 1024  # unit vectors asked at once
# What rounding may do to a module that rounds its input or computes in half precision (LLM.int8
# misses by 1e-2).
ROUNDING = 3e-2


class Scaled(nn.Module):
    """A projection whose output the model multiplies by a number (Cohere's logit scale), or adds
    something to (BART's bias of logits), as one projection. added: broadcasts against (out,)."""

    def __init__(self, projection: nn.Module, factor: float, added: Tensor | None = None) -> None:
        super().__init__()
        self.projection, self.factor, self.added = projection, factor, added

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.projection(x) * self.factor
        return scaled if self.added is None else scaled + self.added


# what holds its numbers as they are: other tensor types are quantised
_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter)


def is_plain(module: nn.Module) -> bool:
    """Whether the module holds its matrix as a floating-point parameter and multiplies by that, no
    more."""
    if type(module).forward not in _PLAIN:
        return False
    weight: Any = getattr(module, "weight", None)
    # accelerate's only moves tensors
    own = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return not own and type(weight) in _TENSORS and weight.ndim == 2 and weight.is_floating_point()


def shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a module that can have a matrix, or None; (vocab, dim) of an embedding. Nothing
    is computed."""
    if isinstance(module, Scaled):
        return shape(module.projection)
    if is_plain(module):
        out, into = matrix(module).shape
        return out, into
    for wide, deep in (
        ("out_features", "in_features"),
        ("nf", "nx"),
        ("num_embeddings", "embedding_dim"),
    ):
        out, into = getattr(module, wide, None), getattr(module, deep, None)
        if isinstance(out, int) and isinstance(into, int):
            return out, into
    return None


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in), with W x + bias == module(x): dequantised, and adapters counted.
    (vocab, dim) of an embedding, as it is looked up. The parameter itself, not a copy, of a plain
    module.

    Raises FamilyError for a module that is not linear in its input.
    """
    if isinstance(module, Scaled):
        return matrix(module.projection) * module.factor
    if is_plain(module):
        weight: Any = module.weight
        return weight.T if isinstance(module, Conv1D) else weight
    sizes = shape(module)
    if sizes is None:
        raise FamilyError(
            f"{type(module).__name__} has no weight matrix (out, in): read its output, not its "
            "weight."
        )
    with _evaluating(module):
        if hasattr(module, "num_embeddings"):
            return _answer(module, torch.arange(sizes[0], device=_place(module)[0]))
        device, dtype = _place(module)
        nothing = _answer(module, torch.zeros(1, sizes[1], device=device, dtype=dtype))
        unit = torch.eye(sizes[1], device=device, dtype=dtype)
        linear = torch.cat([_answer(module, rows) - nothing for rows in unit.split(_ROWS)]).T
        _refuse_curved(module, linear, nothing, device, dtype)
    return linear


def bias(module: nn.Module) -> Tensor | None:
    """What a module with a matrix adds to W x: (out,), or None for nothing."""
    if isinstance(module, Scaled):
        own = bias(module.projection)
        scaled = None if own is None else own * module.factor
        if module.added is None:
            return scaled
        added = module.added.reshape(-1)
        return added if scaled is None else scaled + added
    if is_plain(module):
        return getattr(module, "bias", None)
    sizes = shape(module)
    if sizes is None or hasattr(module, "num_embeddings"):
        return None
    device, dtype = _place(module)
    with _evaluating(module):
        return _answer(module, torch.zeros(1, sizes[1], device=device, dtype=dtype))[0]


def quantised(model: nn.Module) -> bool:
    """Whether some linear layer holds no floating-point matrix: what it gives is rounded, by
    kernels that may differ with the number of rows."""
    odd = (m for m in model.modules() if not is_plain(m) and shape(m))
    plain = (
        any(type(p) in _TENSORS and p.is_floating_point() and p.ndim == 2 for p in m.parameters())
        for m in odd
    )
    return not all(plain)


@torch.no_grad()
def tried(module: nn.Module) -> tuple[Tensor, Tensor]:
    """W x + bias by `matrix` and `bias`, and module(x), on three rows x: (row, out) each."""
    weight, added = matrix(module), bias(module)
    x = _wave(3, weight.shape[1], *_place(module)).to(weight.dtype)
    with _evaluating(module):
        true = _answer(module, x)
    return x @ weight.T + (0 if added is None else added), true


def row_independent(model: nn.Module) -> bool:
    """Whether every linear layer answers a row alone as it does beside other rows.

    False for layers that choose how to round by all rows at once (LLM.int8's outlier columns, one
    activation scale for a whole tensor): there, packing rows of several inputs into one matrix is
    not exact. One layer of each kind is tried, beside a row a hundred times as large.
    """
    kinds: dict[type, tuple[nn.Module, int]] = {}
    shapeless: set[type] = set()
    for module in model.modules():
        kind = type(module)
        if kind in shapeless or is_plain(module):
            continue
        if (sizes := shape(module)) is None or hasattr(module, "num_embeddings"):
            shapeless.add(kind)
        else:
            kinds[kind] = module, sizes[1]
    return all(_rows_alone(module, width) for module, width in kinds.values())


def _rows_alone(module: nn.Module, width: int) -> bool:
    device, dtype = _place(module)
    row = _wave(2, width, device, dtype)
    try:
        with _evaluating(module):
            alone, beside = (
                _answer(module, row[:1]),
                _answer(module, row * row.new_tensor([[1], [100]]))[:1],
            )
    except (RuntimeError, TypeError, AttributeError):
        # no map of rows to rows (Llama 4's router): it cannot be judged
        return False
    return bool((alone - beside).norm() <= 1e-3 * alone.norm())


def _refuse_curved(
    module: nn.Module, weight: Tensor, nothing: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    x = _wave(3, weight.shape[1], device, dtype)
    applied, true = x.to(weight) @ weight.T + nothing, _answer(module, x)
    missed = float((applied - true).float().norm() / true.float().norm().clamp_min(1e-9))
    if not missed <= ROUNDING:
        raise FamilyError(
            f"{type(module).__name__} is not linear in its input (W x misses module(x) by "
            f"{missed:.1e} of its size), so "
            "it has no weight to read. Methods that read activations work; those that read "
            "weights do not."
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Ask a module in eval mode and without a graph; its training flags are restored."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def _answer(module: nn.Module, rows: Tensor) -> Tensor:
    """(row, in) -> (row, out), by `forward`: who listens to the module must not hear these
    questions."""
    return module.forward(rows[None])[0]


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module computes, and what it takes: that of its first floating-point tensor, else
    float32."""
    held = [*module.parameters(), *module.buffers()]
    device = held[0].device if held else torch.device("cpu")
    wide = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return device, next((x.dtype for x in held if x.dtype in wide), torch.float32)


def _wave(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows, width) numbers without a pattern, made without the random generator, which belongs to
    the user."""
    steps = torch.arange(1, rows * width + 1, device=device, dtype=torch.float32)
    return torch.sin(steps * steps).reshape(rows, width).to(dtype)
