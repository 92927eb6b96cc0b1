"""Task vectors: what training has changed in a model, as something that can be added, negated,
scaled, compared, and put into a model again.

Paper: textbook (Ilharco et al., "Editing models with task arithmetic", 2023)

    tau = theta_fine - theta_base           by tensor, in float32
    a + b,  -a,  2 * a,  c + (b - a)        sums of several; the last is an analogy: c is to it as
                                            a is to b
    inside the edit:  theta' = theta + scale tau
    cosine[task, other] = <a, b> / |a| |b|

The two models may be in memory, folders or names, and the trained one a LoRA folder or a model with
adapters inside: then tau is what the adapted layers apply. Folders are read tensor by tensor when a
vector is used, never whole; a vector of a model in memory is computed at once, so that it stays
what it was when the model goes on training.

Reads as: the direction in which training went; added to a model that began at the same weights it
gives much of the ability, negated it takes it away. Does not show where the ability is: most of a
vector can be left out (`editing.merge`), and its length is also the learning rate's. Vectors of
different tasks are nearly orthogonal because there are many weights, not because the tasks differ:
compare cosines with those of vectors trained on the same task from other seeds.
Cost: each tensor of both models read once for each use; an edit holds one more copy of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stratoscope.editing import _merge_deltas, _merge_folder
from stratoscope.editing._merge_deltas import Deltas
from stratoscope.editing._merge_sources import Weights, opened
from stratoscope.engine.edit import Edit
from stratoscope.engine.progress import Progress
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

AXES = {
    "task": "a task vector: what one training has changed in a model",
    "other": "a task vector that the first is compared with",
    "tensor": "a tensor of a model, by its name",
    "block": "the tensors of one layer together (model.layers.3), or those of no layer (rest)",
}
_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A weighted sum of differences, by the names of the base's tensors.

    shapes: of every floating-point tensor of the base. terms: each a weight and what reads its
    tensors; what a term lacks is zero there. `tau[name]` reads one tensor, in float32.
    """

    shapes: Mapping[str, tuple[int, ...]]
    terms: tuple[tuple[float, Deltas], ...]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor. Raises KeyError for a name that the base lacks, InputError for a number
        that is not finite."""
        if not self.touches(name):
            return torch.zeros(self.shapes[name])
        read = [(weight, deltas[name]()) for weight, deltas in self.terms if name in deltas]
        return sum((x * weight for weight, x in read[1:]), read[0][1] * read[0][0])

    def touches(self, name: str) -> bool:
        """Whether a tensor may be anything but zero."""
        return any(name in deltas for _, deltas in self.terms)

    def __add__(self, other: TaskVector) -> TaskVector:
        name = next((n for n in (*self.shapes, *other.shapes)
                     if self.shapes.get(n) != other.shapes.get(n)), None)  # fmt: skip
        if name is not None:
            raise InputError(
                f"task vectors of different models cannot be added: `{name}` is "
                f"{self.shapes.get(name, 'absent')} in one and {other.shapes.get(name, 'absent')} "
                "in the other. Take them from models of one base."
            )
        return TaskVector(self.shapes, self.terms + other.terms)

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector(self.shapes, tuple((factor * w, deltas) for w, deltas in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def __truediv__(self, factor: float) -> TaskVector:
        return self * (1 / factor)


def between(base: Any, fine: Any) -> TaskVector:
    """What was trained into `fine`, which was `base` before.

    base: an LM, a Hugging Face model, a folder or a name. fine: the same, or a LoRA folder, or a
    model with adapters inside. Raises InputError for models that are not of one base, naming the
    first tensor that differs, for other tokens, and an adapter of another model; LoadError for
    weights that cannot be read.
    """
    tau = read(opened(base, "the base"), fine, "the trained model")
    if all(isinstance(source, str | Path) for source in (base, fine)):
        return tau
    held = ((name, tau[name]) for name in tau.shapes if tau.touches(name))
    kept = {name: partial(_itself, x) for name, x in held if bool(x.any())}
    return TaskVector(tau.shapes, ((1.0, kept),))


def read(base: Weights, source: Any, called: str) -> TaskVector:
    """The vector of a source, nothing of it read yet; a task vector is itself. called: how a model
    in memory is called in messages."""
    if isinstance(source, TaskVector):
        return source
    return TaskVector(base.floating, ((1.0, _merge_deltas.of(base, source, called)),))


def edit(lm: LM, request: Any, *, scale: float = 1.0) -> Edit:
    """An edit that adds a vector: `with task_vector.edit(lm, tau, scale=-1): lm(...)`.

    request: a task vector, or a trained model (folder, name, adapter, in memory) whose difference
    from `lm` is one, or a list, which are added up. Raises InputError for one of another model, and
    a scale that is no number.
    """
    base = opened(lm)
    several = list(request) if isinstance(request, list | tuple) else [request]
    if not several or not math.isfinite(scale):
        raise InputError(f"scale={scale} of {len(several)} vectors: give a number and a vector.")
    first, *more = (read(base, one, "the trained model") for one in several)
    tau = sum(more, first)
    deltas = {name: scale * tau[name] for name in tau.shapes if tau.touches(name)}
    return changed(lm, deltas, f"{len(several)} task vectors added, {scale:g} times")


def write(
    base: Any,
    request: Any,
    folder: str | Path,
    *,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """The base with a vector added, as a Hugging Face folder, tensor by tensor. Takes and refuses
    what `between` and `edit` do; raises ResultError for a folder that is taken or has no room."""
    weights = opened(base, "the base")
    tau = read(weights, request, "the trained model")
    _refuse_misfit(weights, tau.shapes)
    about = {"method": "task_vector", "base": weights.called, "scale": scale}
    add = lambda name: scale * tau[name] if tau.touches(name) else None  # noqa: E731
    return _merge_folder.write(weights, add, folder, about, progress)


def compare(vectors: Mapping[str, TaskVector]) -> xr.Dataset:
    """norm (task, tensor), cosine (task, other, tensor), the same by block and of the whole
    (block_norm, block_cosine, total_norm, total_cosine).

    A cosine with a vector that is zero there is NaN. Raises InputError for no vector, and vectors
    of different models.
    """
    if not vectors:
        raise InputError("there is no task vector to compare: give at least one by its name.")
    names = list(sum((0.0 * tau for tau in list(vectors.values())[1:]),
                     next(iter(vectors.values()))).shapes)  # fmt: skip
    found = [_LAYER.match(name) for name in names]
    where = [match[1] if match else "rest" for match in found]
    blocks = list(dict.fromkeys(where))
    products = torch.stack([_products(list(vectors.values()), name) for name in names])
    by_block = torch.zeros(len(blocks), *products.shape[1:], dtype=products.dtype)
    by_block.index_add_(0, torch.tensor([blocks.index(one) for one in where]), products)
    variables: dict[str, Any] = {}
    for prefix, axis, gram in (
        ("", ("tensor",), products),
        ("block_", ("block",), by_block),
        ("total_", (), products.sum(dim=0)),
    ):
        norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        cosine = gram / (norm[..., :, None] * norm[..., None, :])
        variables[f"{prefix}norm"] = (("task", *axis), norm.movedim(-1, 0).numpy())
        variables[f"{prefix}cosine"] = (
            ("task", "other", *axis),
            cosine.movedim((-2, -1), (0, 1)).numpy(),
        )
    tasks = list(vectors)
    coords = {"task": tasks, "other": tasks, "tensor": names, "block": blocks}
    return dataset(variables, method="editing.task_vector", coords=coords)


def changed(lm: LM, deltas: Mapping[str, Tensor], note: str) -> Edit:
    """An edit of these deltas, zeros left out. Raises InputError for what lm's parameters are
    not."""
    base = opened(lm)
    _refuse_misfit(base, {name: tuple(x.shape) for name, x in deltas.items()})
    moved = {name: x for name, x in deltas.items() if bool(x.any())}
    own = dict(lm.model.named_parameters())
    if fixed := [name for name in moved if name not in own]:
        raise InputError(
            f"`{fixed[0]}` is a buffer, which no edit changes: write a folder, and load that."
        )
    return Edit(lm, (), moved, note=note)


def _refuse_misfit(base: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        here = base.kinds.get(name)
        if here is None or here[0] != shape:
            raise InputError(
                f"this task vector is of another model: `{name}` is {shape} there and "
                f"{here[0] if here else 'absent'} in {base.called}. Where files call tensors by "
                "other names than the model does, load both models and give them in memory."
            )


def _products(vectors: Sequence[TaskVector], name: str) -> Tensor:
    """(task, other) inner products of one tensor, in float64."""
    flat = torch.stack([tau[name].flatten().cpu().double() for tau in vectors])
    return flat @ flat.T


def _itself(x: Tensor) -> Tensor:
    return x
