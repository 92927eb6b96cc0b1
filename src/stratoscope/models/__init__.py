"""The wrapped Hugging Face model: `load` or `wrap` one, name its sites, batch its inputs, take its
untrained twin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if TYPE_CHECKING:
    from stratoscope.models.batch import Batch as Batch
    from stratoscope.models.fresh import untrained as untrained
    from stratoscope.models.lm import LM as LM
    from stratoscope.models.loading import load as load
    from stratoscope.models.loading import wrap as wrap
    from stratoscope.models.sites import Site as Site
else:  # fetching a named model needs no torch until it converts one
    __getattr__, __dir__ = lazy(
        __name__,
        __path__,
        load=f"{__name__}.loading",
        wrap=f"{__name__}.loading",
        untrained=f"{__name__}.fresh",
        LM=f"{__name__}.lm",
        Batch=f"{__name__}.batch",
        Site=f"{__name__}.sites",
    )
