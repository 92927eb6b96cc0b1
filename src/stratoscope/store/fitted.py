"""What a method has fitted: its tensors, and all that is needed to say what they are.

A method's own class adds its fields, each a tensor, tensors by name, or what JSON can hold:

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Probes(Fitted):
        weight: Float[Tensor, "depth dim"]

    probes.save(folder)
    same = Probes.load(folder)              # bit for bit

A folder holds `fitted.json` and the one safetensors file that it names. Nothing in it is ever run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stratoscope.errors import InputError, LoadError
from stratoscope.store import tensors as files
from stratoscope.store.cache import sha256

F = TypeVar("F", bound="Fitted")


@dataclass(frozen=True, eq=False, kw_only=True)
class Fitted:
    """Tensors, and the settings, seed and model that they were fitted with.

    provenance: of the model, as `lm.provenance` says it. code: digest of the method's file, taken
    when it was fitted; it says whether what made a loaded fit still stands here. What is not a
    tensor is held as JSON holds it from the start, so that a fit is the same after `load` (tuples
    are lists).
    """

    settings: Mapping[str, Any]
    seed: int | None
    provenance: Mapping[str, Any]
    code: str = ""

    def __post_init__(self) -> None:
        if not self.code:
            object.__setattr__(self, "code", _code(type(self)))
        for name, value in self._fields().items():
            if not _tensors(name, value):
                object.__setattr__(self, name, _plain(f"{self.kind()}.{name}", value))

    @classmethod
    def kind(cls) -> str:
        """What such a fit is called: `layers.concept_depth.Probes`."""
        return f"{cls.__module__.removeprefix('stratoscope.')}.{cls.__qualname__}"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name it is kept under: `field`, or `field/name` of several."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._fields().items():
            tensors |= _tensors(name, value)
        return tensors

    def save(self, folder: str | Path) -> Path:
        """Write the fit into `folder`, made if absent; a fit that was there is replaced at once.

        Raises LoadError when it cannot be written; what was there stays then.
        """
        folder = Path(folder)
        tensors = self.tensors
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / ".fitted.safetensors"
            files.write(fresh, tensors, kind=self.kind())
            digest = sha256(fresh)
            file = fresh.replace(folder / f"fitted-{digest[:12]}.safetensors")
            about = {
                "kind": self.kind(),
                "format": files.FORMAT,
                "made_by": f"stratoscope {importlib.metadata.version('stratoscope')}",
                "tensors": file.name,
                "sha256": digest,
                "fields": {n: v for n, v in self._fields().items() if not _tensors(n, v)},
            }
            part = folder / ".fitted.json"
            part.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
            os.replace(part, folder / "fitted.json")
            for old in folder.glob("fitted-*.safetensors"):
                if old != file:
                    old.unlink()
        except OSError as error:
            raise LoadError(
                f"The fit {self.kind()} could not be written to {folder}: {error}. Make room, or "
                "give another folder."
            ) from error
        return folder

    @classmethod
    def load(cls: type[F], folder: str | Path, *, device: str | torch.device = "cpu") -> F:
        """What `save` wrote there.

        Raises LoadError for a folder that holds no fit, that of another method, one of a newer
        stratoscope, or a damaged one.
        """
        folder = Path(folder)
        about = _about(folder, cls.kind())
        file = folder / Path(about["tensors"]).name
        if not file.is_file() or sha256(file) != about["sha256"]:
            raise LoadError(
                f"The fit in {folder} is damaged: {file.name} is "
                f"{'not the file that was saved' if file.is_file() else 'missing'}. Fit it again."
            )
        fields: dict[str, Any] = dict(about["fields"])
        for name, tensor in files.read(file, kind=cls.kind(), device=device)[0].items():
            field, several, inner = name.partition("/")
            if several:
                fields.setdefault(field, {})[inner] = tensor
            else:
                fields[field] = tensor
        own = {field.name for field in dataclasses.fields(cls)}
        if fields.keys() != own:
            odd = ", ".join(sorted(fields.keys() ^ own))
            raise LoadError(
                f"The fit in {folder} does not have the fields of today's {cls.kind()} ({odd}): it "
                "was saved by another version of the method. Fit it again."
            )
        return cls(**fields)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _tensors(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors of one field by the name they are kept under; none where it holds no tensors."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping) and value and all(isinstance(x, Tensor) for x in value.values()):
        return {f"{name}/{inner}": x for inner, x in value.items()}
    return {}


def _plain(what: str, value: Any) -> Any:
    """A value as JSON gives it back. Raises InputError for what it cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} is no tensor, and JSON cannot hold it ({error}): a fit holds tensors, "
            "numbers, texts, and lists and tables of these."
        ) from error


def _about(folder: Path, kind: str) -> dict[str, Any]:
    """`fitted.json`, if it is that of a fit of this kind."""
    path = folder / "fitted.json"
    if not path.is_file():
        what = "holds no fitted.json" if folder.exists() else "does not exist"
        raise LoadError(f"A fit of {kind} was to be loaded from {folder}, which {what}.")
    try:
        about = json.loads(path.read_text("utf-8"))
        kind_saved, version = str(about["kind"]), about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is damaged ({error!r:.200}). Fit it again.") from error
    files.refuse_newer(path, version)
    if kind_saved != kind:
        raise LoadError(
            f"{folder} holds a fit of {kind_saved}, not of {kind}: give another folder."
        )
    try:
        return {"tensors": str(about["tensors"])} | {k: about[k] for k in ("sha256", "fields")}
    except KeyError as error:
        raise LoadError(f"{path} is damaged: it lacks {error}. Fit it again.") from error


def _code(cls: type) -> str:
    """Eight characters of the hash of the file that defines a class; "" where there is no file."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8] if path else ""
