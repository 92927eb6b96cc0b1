"""Where arms are kept: cards and numbers in a folder that is committed, models in the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stratoscope.errors import ResultError
from stratoscope.store import tensors
from stratoscope.store.cache import cache_root


@dataclass(frozen=True)
class Ended:
    """An arm that was trained. card: rate, parameters, operations, curve, held-out numbers.
    units: name -> (unit,). folder: the model, or None where it was trained on another machine."""

    card: Mapping[str, Any]
    units: Mapping[str, Tensor]
    folder: Path | None


def ended(name: str, arm: str, seed: int, origin: str, records: Path) -> Ended | None:
    """The arm as its records have it; None where it has not ended yet."""
    card = record(path := card_path(records, arm, seed), origin)
    if card is None:
        return None
    units, _ = tensors.read(path.with_suffix(".safetensors"), kind="arm")
    place = folder(name, arm, seed, origin)
    return Ended(card, units, place if place.exists() else None)


def keep(path: Path, card: Mapping[str, Any], units: Mapping[str, Tensor]) -> None:
    """Write the numbers, and then the card: an arm with a card has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors.write(path.with_suffix(".safetensors"), units, kind="arm", about=card["origin"])
    write(path, card)


def folder(name: str, arm: str, seed: int, origin: str) -> Path:
    """Where its trained model lies."""
    return cache_root() / "arms" / f"{name}-{arm}-seed{seed}-{origin[:8]}"


def workshop(name: str, arm: str, what: str, origin: str) -> Path:
    """Where one training of it goes on."""
    made = cache_root() / "arms" / f".{name}-{arm}-{what}-{origin[:8]}.training"
    made.mkdir(parents=True, exist_ok=True)
    return made


def search_path(records: Path, arm: str) -> Path:
    """The record of its search for a rate."""
    return records / f"{arm}-rate.json"


def card_path(records: Path, arm: str, seed: int) -> Path:
    """The card of one seed; its numbers lie beside it."""
    return records / f"{arm}-seed{seed}.json"


def record(path: Path, origin: str) -> dict[str, Any] | None:
    """What was written there, or None. Raises ResultError for the record of another origin."""
    if not path.is_file():
        return None
    card = json.loads(path.read_text("utf-8"))
    if card["origin"] != origin:
        raise ResultError(
            f"{path} is the record of other settings or another version of this arm: delete it, "
            "and the arm is trained again."
        )
    return card


def write(path: Path, card: Mapping[str, Any]) -> None:
    """Replace a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    os.replace(part, path)
