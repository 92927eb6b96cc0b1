"""Tensors in one safetensors file, and in its header what is not a tensor, as JSON.

Written beside its place and moved there in one step: an interruption leaves the file that was there
before. The header says what kind of file it is and in which format, so that another kind, or a file
of a newer stratoscope, is refused by name and not half understood.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stratoscope.errors import LoadError

FORMAT = 1  # raise it when a file of today could be misread by the code of yesterday


def write(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, about: Any = None) -> None:
    """Replace `path` by these tensors and `about`, which JSON must be able to hold.

    kind: a word for what the file holds, which `read` asks for. Raises OSError when it cannot be
    written; what was there stays then.
    """
    path = Path(path)
    # each writer has a part of its own
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    # one entry only: safetensors writes several in any order, and like files should be alike
    header = {"about": json.dumps({"kind": kind, "format": FORMAT, "about": about})}
    try:
        save_file(_apart(tensors), part, metadata=header)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read(
    path: str | Path, *, kind: str | None, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], Any]:
    """The tensors and `about` that `write` put there.

    kind: what the file must hold; None takes any safetensors file. Raises LoadError for a file that
    is not there, is damaged, holds something else, or was written by a newer stratoscope.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path} {'is no file' if path.exists() else 'does not exist'}.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get("about", "null"))
            ours = isinstance(header, dict) and "kind" in header
            _refuse_foreign(path, header if ours else {}, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, header["about"] if ours else header
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(
            f"{path} cannot be read ({error}): it is damaged, cut short, or no safetensors file. "
            "Save it again."
        ) from error


def _refuse_foreign(path: Path, header: Mapping[str, Any], kind: str | None) -> None:
    kind_saved = header.get("kind", "")
    if kind is not None and kind_saved != kind:
        raise LoadError(
            f"{path} was to hold {kind!r}, and holds "
            f"{repr(kind_saved) if kind_saved else 'other tensors'}: give another file."
        )
    refuse_newer(path, header.get("format", FORMAT))


def refuse_newer(path: Path, version: Any) -> None:
    """Raise LoadError for the format of a file that this version cannot know."""
    if not str(version).isdigit() or int(version) > FORMAT:
        raise LoadError(
            f"{path} has the format {version!r} of a newer stratoscope; this one reads "
            f"{FORMAT} and older: install the newer one."
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with memory of their own each, as a file needs them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        place = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if place in seen else own
        seen.add(place)
    return separate
