"""What a long sweep has finished, kept in a file so that an interrupted one goes on where it
stopped.

One safetensors file: the results so far (NaN where there is none yet) and a fingerprint of the
question. It is written beside its place and moved there, so that an interruption leaves the last
complete state.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.packed import Base
from stratoscope.errors import ResultError
from stratoscope.models.lm import LM


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
        (2, *base.asked.shape), generator=torch.Generator().manual_seed(0)
    ).to(base.asked)
    examples = torch.arange(len(base.asked)).repeat(2)
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
        with safe_open(path, framework="pt") as file:
            saved, result = (file.metadata() or {}).get("fingerprint"), file.get_tensor("result")
    except (SafetensorError, OSError) as error:
        raise ResultError(
            f"{path} is not a saved sweep ({error}): give another path, or delete it."
        ) from error
    if saved != key or result.shape != shape:
        raise ResultError(
            f"{path} holds another sweep (other weights, inputs, interventions or metric): give "
            "another path, or delete it."
        )
    return result


def write(path: Path, key: str, result: Tensor) -> None:
    """Replace the file by today's results. Raises ResultError when it cannot be written; the old
    file stays then."""
    part = path.with_name(
        f".{path.name}.{os.getpid()}-{threading.get_ident()}.part"
    )  # each writer has its own
    try:
        save_file({"result": result.contiguous()}, part, metadata={"fingerprint": key})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ResultError(
            f"{path} cannot be written ({error}): free some space, or give another path."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
