"""LongRoPE: models that turn positions by other angles once a text is longer than a certain length.

Transformers chooses the angles of all rows of a batch by its longest, so that a short prompt beside
a long one would not be what it is alone. Here a batch is split by that length where the angles are
made, and nowhere else: every row gets those it has alone, and whoever reads, changes, takes
gradients or packs cells still sees one batch and one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.errors import FamilyError
from stratoscope.models.run import Run


def limit(config: Any) -> int | None:
    """How many tokens a text may have before the angles change; None for other models."""
    table = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (table, *table.values()) if isinstance(kind, Mapping)]
    long = next((kind for kind in kinds if kind.get("rope_type") == "longrope"), None)
    if long is None:
        return None
    return long.get("original_max_position_embeddings") or config.original_max_position_embeddings


@contextmanager
def own_angles(model: nn.Module, config: Any, run: Run) -> Iterator[None]:
    """Inside the block every row is turned by the angles that it has alone.

    Raises FamilyError where rows lie on both sides of `limit`, and the model has no module that
    makes its angles.
    """
    most = limit(config)
    if most is None or (lengths := run.lengths) is None:
        yield
        return
    long = lengths > most
    if bool(long.all()) or not bool(long.any()):
        yield
        return
    modules = [module for module in model.modules() if _turns(module)]
    if not modules:
        raise FamilyError(
            f"prompts of {int(lengths.min())} to {int(lengths.max())} tokens in one batch: "
            f"{type(model).__name__} (LongRoPE) turns positions by other angles above {most}, "
            f"and no module was found that makes them. Run those above {most} apart."
        )
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(_row_by_row(long, most), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _turns(module: nn.Module) -> bool:
    """Whether a module makes LongRoPE's angles, for all layers or those of one type."""
    kind = getattr(module, "rope_type", None)
    return "longrope" in (kind.values() if isinstance(kind, Mapping) else (kind,))


def _row_by_row(long: Tensor, most: int) -> Callable[..., Any]:
    """A hook that gives rows which are not long the angles of short texts."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], made: Any) -> Any:
        given = signature(module.forward).bind(*args, **kwargs).arguments
        # no position of a short row changes by it, and the padding behind them is read by nobody
        within = {"position_ids": given["position_ids"].clamp(max=most - 1)}
        short = module.forward(**given | within)
        pairs = zip(made, short) if isinstance(made, tuple) else [(made, short)]
        angles = tuple(_chosen(long, *pair) for pair in pairs)
        return angles if isinstance(made, tuple) else angles[0]

    return hook


def _chosen(long: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of rows that are long the one, else the other: (row or 1, position, dim) each."""
    if one.ndim < 3 or one.shape[-3] not in (1, len(long)):
        raise FamilyError(
            f"LongRoPE angles of shape {tuple(one.shape)} for {len(long)} rows, some above and "
            "some below the length at which they change: whose they are is unknown. Run them apart."
        )
    return torch.where(long.to(one.device)[:, None, None], one, other)
