"""ResNet-56 trained on CIFAR-10: 0.86 million weights, 94.4 % of the first 500 test pictures right.

The network of He et al. (2016), section 4.2, with projections where the width grows. It takes
pixels from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratoscope.errors import LoadError
from stratoscope.lab.nets._net import pixels
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "torch-optim",
            "0.0.4",
            "04a0ca012ae28d85148f116c593f3fad2fb2e1d27ed788da8ac963078e4b3625",
            59080995,
        ),
    ),
    inside=("torchopt/model/resnet56_cifar10_0.9320_45k.pth",),
)
LICENCE = "MIT"


def preprocess(x: np.ndarray | Tensor) -> Tensor:
    """Pictures uint8 (example, 32, 32, 3) to float32 (example, 3, 32, 32) from 0 to 1."""
    return pixels(x)


def prepare(raw: Path, ready: Path) -> None:
    """The published file is a pickled module. It is read with stand-ins for its classes, so that
    none of its code runs."""
    import torch

    from stratoscope.lab.nets._resnet import ResNet56
    from stratoscope.store import tensors

    file = next(raw.iterdir())
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    try:
        with torch.serialization.safe_globals([(_Shell, name) for name in classes]):
            shell = torch.load(file, map_location="cpu", weights_only=True)
        weights = {_renamed(name): tensor.detach().contiguous() for name, tensor in shell.tensors()}
        ResNet56().load_state_dict(weights)  # every name and shape is as we build it
    except Exception as error:  # whatever a file that is not what it should be runs into
        raise LoadError(
            f"{file.name} could not be read as a ResNet-56: {type(error).__name__}: {error}"
        ) from error
    tensors.write(ready / "model.safetensors", weights, kind="weights")


def load(folder: Path) -> nn.Module:
    """The network with its weights."""
    from stratoscope.lab.nets._resnet import ResNet56
    from stratoscope.store import tensors

    model = ResNet56()
    model.load_state_dict(tensors.read(folder / "model.safetensors", kind=None)[0])
    return model


class _Shell:
    """What is left of a pickled module when its class is not run: its attributes."""

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, as state_dict() would give them."""
        held: dict[str, Any] = vars(self)
        for name, tensor in {**held["_parameters"], **held["_buffers"]}.items():
            if tensor is not None:
                yield prefix + name, tensor
        for name, inner in held["_modules"].items():
            yield from inner.tensors(f"{prefix}{name}.")


def _renamed(name: str) -> str:
    name = re.sub(
        r"^layer(\d)", lambda match: f"stages.{int(match[1]) - 1}", name.removeprefix("module.")
    )
    name = name.replace("bn", "norm").replace("shortcut", "skip").replace("linear", "head")
    return re.sub(r"^(conv|norm)1", r"\1", name)
