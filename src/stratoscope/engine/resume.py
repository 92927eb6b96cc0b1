"""What a long sweep has finished, kept in a file so that an interrupted one goes on where it
stopped.

One file of `store.tensors`: the results so far (NaN where there is none yet) and a fingerprint of
the question. An interruption leaves the last complete state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.base import Base
from stratoscope.engine.intervene import Intervention
from stratoscope.errors import LoadError, ResultError
from stratoscope.models.lm import LM
from stratoscope.store import tensors as files


def fingerprint(
    lm: LM,
    base: Base,
    table: Sequence[Sequence[Intervention]],
    metric: Callable[[Tensor, Tensor], Tensor],
) -> str:
    """A hash of the weights, the inputs, every intervention (outer ones too), and the metric: of
    the base run, and of made-up logits, by which two metrics that agree there are told apart."""
    digest = hashlib.sha256(str(lm.provenance["weights"]).encode())
    batch = base.batch
    tensors = (batch.ids, batch.mask, *batch.extra.values(), base.metric, _probed(base, metric))
    for tensor in (x for x in tensors if x is not None):
        digest.update(_bytes(tensor))
    for number, cell in enumerate([outside.changes(lm) or (), *table]):
        digest.update(f"cell {number}".encode())
        for change in cell:
            where = [
                getattr(change, name)
                for name in ("positions", "units", "keys", "examples", "steps")
            ]
            kind = (change.operation, tuple(change.value.shape), change.value.dtype)
            digest.update(f"{change.site} {kind} {[_plain(x) for x in where]}".encode())
            digest.update(_bytes(change.value))
    return digest.hexdigest()


def _probed(base: Base, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The metric of logits drawn from a fixed seed, two for each example, one of them loud."""
    quiet, loud = torch.randn(
        (2, *base.answers.shape), generator=torch.Generator().manual_seed(0)
    ).to(base.answers)
    examples = torch.arange(len(base.answers)).repeat(2)
    return metric(torch.cat([quiet, 10 * loud]), examples)


def _plain(option: object) -> object:
    """Positions and units as lists, whatever sequence they came in: printed whole, so that two
    never look alike."""
    return option if option is None else torch.as_tensor(option).tolist()


def read(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The results saved for this very question, or None when there is no file.

    Raises ResultError for a file of another sweep, or one that is not such a file.
    """
    if not path.exists():
        return None
    try:
        saved_tensors, saved = files.read(path, kind="sweep")
    except LoadError as error:
        raise ResultError(
            f"{path} is not a saved sweep ({error}): give another path, or delete it."
        ) from error
    result = saved_tensors["result"]
    if saved != key or result.shape != shape:
        raise ResultError(
            f"{path} holds another sweep (other weights, inputs, interventions or metric): give "
            "another path, or delete it."
        )
    return result


def write(path: Path, key: str, result: Tensor) -> None:
    """Replace the file by today's results. Raises ResultError when it cannot be written; the old
    file stays then."""
    try:
        files.write(path, {"result": result}, kind="sweep", about=key)
    except OSError as error:
        raise ResultError(
            f"{path} cannot be written ({error}): free some space, or give another path."
        ) from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
