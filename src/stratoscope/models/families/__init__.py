"""The families, one file each; `find` returns the family of a config, or None when no file names
its model type.

A file offers `FAMILIES`: model_type -> Family, or -> a function of the config where the layout
depends on it. The folder is the list: adding an architecture is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from stratoscope.models.family import Family


def find(config: Any) -> Family | None:
    """The family for a Hugging Face config, by its `model_type`."""
    family: Any = _all().get(config.model_type)
    return family if family is None or isinstance(family, Family) else family(config)


def known() -> list[str]:
    """Every model type that a family names, less those that are known and refused."""
    from stratoscope.models.families.refused import REASONS

    return sorted(set(_all()) - set(REASONS))


@cache
def _all() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        table |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", {})
    return table
