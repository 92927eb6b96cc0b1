"""A model's folder as files: which hold its weights, what their headers say, and how its class ties
tensors. The model is not opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stratoscope.errors import LoadError
from stratoscope.models import own
from stratoscope.store import hub

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# of a hub repository, what a folder must have
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def shards(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises LoadError where there are none."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = {Path(name).name for name in table(index)["weight_map"].values()}
    files = [folder / name for name in sorted(names)]
    if lost := [file.name for file in files if not file.is_file()]:
        raise LoadError(
            f"{folder} lacks {lost[0]}: weights are read from safetensors alone, as "
            "save_pretrained() writes them. Save the model again, or fetch the file."
        )
    return files


def header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a safetensors file, as they are, and what they say of each tensor.
    Raises LoadError for a damaged one."""
    try:
        with file.open("rb") as stream:
            begun = stream.read(8)
            text = stream.read(int.from_bytes(begun, "little"))
        rows = json.loads(text)
        rows.pop("__metadata__", None)
        end = max([0, *(row["data_offsets"][1] for row in rows.values())])
        if file.stat().st_size != 8 + len(text) + end:
            raise ValueError("its length is not what it says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise LoadError(f"{file} is damaged or no safetensors file ({error}).") from error
    return begun + text, rows


def handle(path: Path) -> Any:
    """An open safetensors file. Anew if it was replaced since."""
    return _kept(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _kept(path: Path, changed: int) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} cannot be read ({error}).") from error


def tied(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors that the model's class ties, to those of the tensors they are."""
    import transformers

    ours = own.module_of(folder)
    with hub.quiet():
        try:
            whole = transformers.AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise hub.explain_failure(str(folder), error) from error
    name = next(iter(config.get("architectures") or ()), "")
    ties = getattr(getattr(ours or transformers, name, None), "_tied_weights_keys", None)
    tied = getattr(whole.get_text_config(), "tie_word_embeddings", False)
    return dict(ties) if tied and isinstance(ties, Mapping) else {}


def fetched(name: str) -> Path:
    """A repository of the hub as a folder."""
    from huggingface_hub import snapshot_download

    with hub.quiet():
        try:
            return Path(snapshot_download(name, allow_patterns=_FILES))
        except (OSError, ValueError) as error:
            raise hub.explain_failure(name, error) from error


def table(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"{path} cannot be read as JSON ({error}).") from error
