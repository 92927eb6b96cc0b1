"""Merge: several models that were trained from one base as one model of the same size.

Paper: textbook (Yadav et al., "TIES-merging", 2023; Yu et al., "Language models are super Mario",
2024 (DARE); Ilharco et al., "Editing models with task arithmetic", 2023)

    tau[task] = theta[task] - theta_base                                in float32
    linear            m = sum w tau / sum w                             the mean of the models
    task_arithmetic   m = sum w tau
    magnitude_prune   m = sum w trim(tau)       trim: the largest `density` of each tensor, else 0
    ties              m = the mean of trim(tau) over the tasks that have the sign of their sum
    dare_linear       m = sum w drop(tau)       drop: tau / density with that probability, else 0
    dare_ties         as ties, with drop in place of trim
    theta' = theta_base + scale m                                       in the base's dtype

`_merge_rules.py` says what weights mean in TIES. The draws of DARE are of (seed, tensor's name), so
that they do not depend on files or order. Integer buffers are the base's, tied weights stay tied.

Reads as: one model that does what its sources do, as far as they did not want opposite things of
the same weights: compare each source's score before and after (`stratoscope merge --texts`). Does
not show that merging beats training on all tasks at once, nor which scale is best: choose that on
texts that no score is taken of.
Cost: each tensor of each model read once; one tensor of each in memory where folders are given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.editing import _merge_folder, _merge_rules, task_vector
from stratoscope.editing._merge_folder import refuse_taken
from stratoscope.editing._merge_rules import METHODS
from stratoscope.editing._merge_sources import Weights, opened
from stratoscope.engine.edit import Edit
from stratoscope.engine.progress import Progress
from stratoscope.errors import InputError
from stratoscope.models.lm import LM

__all__ = ["METHODS", "edit", "refuse_taken", "size", "write"]


def edit(
    lm: LM,
    request: Sequence[Any],
    *,
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    shares: bool = True,
    seed: int = 0,
) -> Edit:
    """An edit that makes the base the merged model: `with merge.edit(lm, [a, b]): lm(...)`.

    lm: the base. request: models (LMs, Hugging Face models, folders, names, adapters) or task
    vectors. weights: one for each, default 1. density: of what is kept, default 0.2. scale: of the
    merged vector. shares: what weights mean in TIES: shares as in mergekit, else factors as in
    PEFT. Raises InputError for models that are not of one base, naming the first tensor that
    differs, a number that is not finite, naming its tensor and model, and options that mean
    nothing; LoadError for weights that cannot be read.
    """
    base = opened(lm, "the base")
    mixed = _mixing(base, request, method, weights, density, scale, shares, seed)
    made = {name: delta for name in base.floating if (delta := mixed(name)) is not None}
    return task_vector.changed(lm, made, f"{len(request)} models merged by {method}")


def write(
    base: Any,
    models: Sequence[Any],
    folder: str | Path,
    *,
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    shares: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """The merged model as a Hugging Face folder with the base's config, tokenizer and shards.

    base: an LM, a Hugging Face model, a folder or a name. Takes and refuses what `edit` does;
    raises ResultError for a folder that is taken, or has no room for it. It is there whole or not
    at all.
    """
    whole = opened(base, "the base")
    mixed = _mixing(whole, models, method, weights, density, scale, shares, seed)
    called = [str(m) if isinstance(m, str | Path) else f"models[{n}]" for n, m in enumerate(models)]
    about = {
        "base": whole.called, "models": called, "method": method, "weights": weights,
        "density": density, "scale": scale, "shares": shares, "seed": seed,
    }  # fmt: skip
    return _merge_folder.write(whole, mixed, folder, about, progress)


def size(base: Any) -> int:
    """Bytes of the weights that `write` would write."""
    return opened(base, "the base").size


def _mixing(
    base: Weights,
    models: Sequence[Any],
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    scale: float,
    shares: bool,
    seed: int,
) -> Callable[[str], Tensor | None]:
    """What is added to a tensor by its name; None where no model changes it."""
    if isinstance(models, str | Path) or not models:
        raise InputError(f"models={models!r}: give a list of at least one model.")
    share = torch.tensor([1.0] * len(models) if weights is None else [float(w) for w in weights])
    if len(share) != len(models) or not math.isfinite(scale):
        raise InputError(
            f"{len(models)} models, {len(share)} weights and scale={scale}: give one weight for "
            "each model, and a number."
        )
    kept = _merge_rules.checked(method, density, share)
    vectors = [task_vector.read(base, one, f"models[{n}]") for n, one in enumerate(models)]
    for tau in vectors[1:]:
        _ = vectors[0] + tau  # which refuses vectors of other shapes

    def mixed(name: str) -> Tensor | None:
        if not any(tau.touches(name) for tau in vectors):
            return None
        taus = torch.stack([tau[name].to(base.device) for tau in vectors])
        options = {"density": kept, "shares": shares, "generator": _generator(seed, name)}
        return scale * _merge_rules.mixed(taus, share, method, **options)

    return mixed


def _generator(seed: int, name: str) -> torch.Generator:
    """Of one tensor. torch's CPU generator looks at 32 bits."""
    mark = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mark[:4], "little"))
