"""A changed model as an ordinary Hugging Face folder, written tensor by tensor.

Each shard has its base's header, to the byte, and behind it the same tensors in the same order, in
the same dtypes; so no shard is ever whole in memory. It is made beside its place and moved there at
the end: an interruption leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.editing._merge_files import DTYPES, header, shards
from stratoscope.editing._merge_sources import Weights
from stratoscope.engine.progress import Progress, shown
from stratoscope.errors import ResultError
from stratoscope.models import finite
from stratoscope.store import hub

Changed = Callable[[str], Tensor | None]  # a tensor's name -> what is added to it
_COPIED = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
# a card names the base's weights by their hash, which these are not
_LEFT = {"card.json", "merge.json"}
ABOUT = "merge.json"


def refuse_taken(folder: Path) -> None:
    """Raise ResultError where something stands already, or nothing could be put."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ResultError(f"{folder} is there already: give another folder, or delete it.")
    if not folder.absolute().parent.is_dir():
        raise ResultError(f"The folder of {folder} does not exist: create it, or give another.")


def write(
    base: Weights,
    changed: Changed,
    folder: str | Path,
    about: Mapping[str, Any],
    progress: Progress | None = None,
) -> Path:
    """The base with what is added, as a folder; about: goes into merge.json.

    Raises ResultError for a folder that is taken, and one that cannot be written or has no room;
    InputError for a tensor that becomes infinite in the base's dtype. Nothing is left then.
    """
    place = Path(folder).expanduser().absolute()
    refuse_taken(place)
    free = shutil.disk_usage(place.parent).free
    if free < base.size:
        raise ResultError(
            f"{place} takes {base.size / 1e6:,.0f} MB and there are {free / 1e6:,.0f} MB: make "
            "room, or give a folder on another disk."
        )
    part = place.with_name(f".{place.name}.merging")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed outright
    try:
        part.mkdir()
        with shown(f"writing {place.name}", progress) as tell:
            (_streamed if base.folder else _saved)(base, changed, part, tell)
        (part / ABOUT).write_text(json.dumps(about, indent=2, default=str) + "\n", "utf-8")
        os.replace(part, place)
    except OSError as error:
        raise ResultError(
            f"{place} could not be written: {error}. Make room, or give another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _streamed(base: Weights, changed: Changed, part: Path, tell: Progress) -> None:
    folder = base.folder or Path()
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in _COPIED or file.name.startswith(("LICENSE", "NOTICE"))
        if file.is_file() and wanted and file.name not in _LEFT:
            shutil.copyfile(file, part / file.name)
    done, heads = 0, {file: header(file) for file in shards(folder)}
    total = sum(len(rows) for _, rows in heads.values())
    for file, (head, rows) in heads.items():
        with (part / file.name).open("wb") as stream:
            stream.write(head)
            for name in sorted(rows, key=lambda name: rows[name]["data_offsets"]):
                value = _made(base, changed, name).to(DTYPES[rows[name]["dtype"]])
                stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                done += 1
                tell(done, total, name)


def _saved(base: Weights, changed: Changed, part: Path, tell: Progress) -> None:
    """A model in memory by its own `save_pretrained`, which knows what its files call tensors."""
    made = {}
    for done, name in enumerate(base.kinds, 1):
        made[name] = _made(base, changed, name)
        tell(done, len(base.kinds), name)
    whole = made | {alias: made[name] for alias, name in base.ties.items()}
    with hub.quiet():
        base.model.save_pretrained(part, state_dict=whole)
        for reader in (base.lm.tokenizer, base.lm.processor) if base.lm else ():
            if reader is not None:
                reader.save_pretrained(part)


@torch.no_grad()
def _made(base: Weights, changed: Changed, name: str) -> Tensor:
    """A tensor of the base with what is added, in float32 and then in its own dtype."""
    value = base[name]
    delta = changed(base.ties.get(name, name)) if value.is_floating_point() else None
    if delta is None:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)
    sum_ = (value.to(wide) + delta.to(value.device, wide)).to(value.dtype)
    finite.refuse({f"`{name}`, once changed,": sum_})
    return sum_
