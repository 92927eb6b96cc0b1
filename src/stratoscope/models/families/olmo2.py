"""OLMo 2: norms only after attention and MLP, and over all of q and k at once."""

from __future__ import annotations

from stratoscope.models.families.gemma import TOWER
from stratoscope.models.family import Family

FAMILIES = {"olmo2": Family("olmo2", {"": TOWER})}
