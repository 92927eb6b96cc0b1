"""`net` loads a convolutional network by name, ready to use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratoscope.lab import _subjects
from stratoscope.store import source
from stratoscope.store.cache import Say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


def net(
    name: str, *, path: str | os.PathLike[str] | None = None, progress: Say | None = None
) -> nn.Module:
    """The network `name` in evaluation mode, float32, on the CPU; fetched and converted now if it
    is not in the cache.

    Its `preprocess(x)` turns pictures, uint8 (example, row, column, 3), into what the network
    takes. path: the archive, or a folder that holds it. Raises InputError for an unknown name;
    LoadError when it cannot be had.
    """
    module = _module(name)
    model = module.load(fetch(name, path=path, progress=progress)).eval()
    model.preprocess = module.preprocess
    return model


def fetch(
    name: str, *, path: str | os.PathLike[str] | None = None, progress: Say | None = None
) -> Path:
    """The folder of the network `name` in the cache, made now if it is absent; nothing is loaded
    from it."""
    module = _module(name)
    given = {"licence": module.LICENCE, "path": path, "progress": progress}
    return source.fetch("models", name, module.SOURCE, prepare=module.prepare, **given)


def card(name: str) -> dict[str, Any]:
    """What is known of a network without fetching it; `folder` is None while it is not in the
    cache."""
    module = _module(name)
    folder = source.place("models", name, module.SOURCE)
    return _subjects.card(name, module, folder=folder and str(folder))


def names() -> list[str]:
    """Every network there is."""
    from stratoscope.lab import nets

    return _subjects.names(nets)


def pixels(x: np.ndarray | Tensor) -> Tensor:
    """Pictures uint8 (example, row, column, 3) to float32 (example, 3, row, column) from 0 to 1."""
    import numpy as np
    import torch

    # a copy: x may be read-only
    whole = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))
    return whole.permute(0, 3, 1, 2).float() / 255


def _module(name: str) -> Any:
    from stratoscope.lab import nets

    return _subjects.find(nets, name, "network")
