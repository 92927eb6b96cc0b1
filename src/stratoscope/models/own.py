"""Models of our own: the file of `architectures/` that defines a type, and the family on a class.

`config.model_type` is "st_" and the name of the file. The file is found by the text of the folder
and imported alone, by its name: it is code of this package, never code that came with the weights.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from stratoscope.errors import FamilyError, LoadError
from stratoscope.models.family import Family

SHELVES = Path(__file__).parents[1] / "architectures"


def module_of(folder: Path | str) -> ModuleType | None:
    """The file that defines the model saved in `folder`; None where it is none of ours.

    Raises LoadError for a type of ours that no file defines.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        kind = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a hub id, or a folder of which Transformers says what is wrong
    if not re.fullmatch(r"st_\w+", kind):
        return None
    for path in sorted(SHELVES.glob(f"*/{kind.removeprefix('st_')}.py")):
        if f'model_type = "{kind}"' in path.read_text("utf-8"):
            return import_module(f"stratoscope.architectures.{path.parent.name}.{path.stem}")
    raise LoadError(
        f"The model in {folder} is of the type {kind!r}, which an architecture of stratoscope has, "
        "and none of this version defines it: install the stratoscope it was made with."
    )


def family_of(model: Any) -> Family | None:
    """The family that the model's class carries as `FAMILY`, a Family or a function of the config;
    None where it carries none. Raises FamilyError for anything else."""
    held = getattr(type(model), "FAMILY", None)
    if held is None or isinstance(held, Family):
        return held
    family = held(model.config) if callable(held) else held
    if not isinstance(family, Family):
        raise FamilyError(
            f"{type(model).__name__}.FAMILY is {type(held).__name__} {held!r:.60}: it must be a "
            "Family, or a function that gives one for the config."
        )
    return family
