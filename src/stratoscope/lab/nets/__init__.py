"""Real convolutional networks by name: trained by others, fetched once, kept as safetensors in the
user's cache.

    model = lab.net("resnet56-cifar10")
    model(model.preprocess(pictures.x)).argmax(1)       # pictures: lab.data("cifar10").test

Real language models and text encoders come through `stratoscope.load` (`store/pretrained.py`). A
file here that defines `SOURCE`, `LICENCE`, `prepare(raw, ready)`, `load(folder)` and
`preprocess(x)` is a net.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if TYPE_CHECKING:
    from stratoscope.lab.nets._net import card as card
    from stratoscope.lab.nets._net import fetch as fetch
    from stratoscope.lab.nets._net import names as names
    from stratoscope.lab.nets._net import net as net
else:
    _own = f"{__name__}._net"
    __getattr__, __dir__ = lazy(__name__, __path__, net=_own, card=_own, fetch=_own, names=_own)
