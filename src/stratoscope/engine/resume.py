"""What a long sweep has finished, kept in a file so that an interrupted one goes on where it stopped.

One safetensors file: the results so far (NaN where there is none yet) and a fingerprint of the question. It is written
beside its place and moved there, so that an interruption leaves the last complete state.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stratoscope.engine.intervene import Intervention
from stratoscope.errors import ResultError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM


def fingerprint(lm: LM, batch: Batch, table: Sequence[Sequence[Intervention]], base: Tensor) -> str:
    """A hash of the weights, the inputs, every intervention and the base run's metric."""
    digest = hashlib.sha256(str(lm.provenance["weights"]).encode())
    for tensor in (x for x in (batch.ids, batch.mask, *batch.extra.values(), base) if x is not None):
        digest.update(_bytes(tensor))
    for change in (change for cell in table for change in cell):
        where = (change.positions, change.units, change.keys, change.examples)
        digest.update(f"{change.site} {change.operation} {where}".encode())
        digest.update(_bytes(change.value))
    return digest.hexdigest()


def read(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """The results saved for this very question, or None when there is no file.

    Raises ResultError for a file of another sweep, or one that is not such a file.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            saved, result = (file.metadata() or {}).get("fingerprint"), file.get_tensor("result")
    except (SafetensorError, OSError) as error:
        raise ResultError(f"{path} is not a saved sweep ({error}): give another path, or delete it.") from error
    if saved != key or result.shape != shape:
        raise ResultError(
            f"{path} holds another sweep (other weights, inputs, interventions or metric): give another path, or delete it."
        )
    return result


def write(path: Path, key: str, result: Tensor) -> None:
    """Replace the file by today's results. Raises ResultError when it cannot be written; the old file stays then."""
    part = path.with_name(f".{path.name}.part")
    try:
        save_file({"result": result.contiguous()}, part, metadata={"fingerprint": key})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ResultError(f"{path} cannot be written ({error}): free some space, or give another path.") from error
    finally:
        part.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
