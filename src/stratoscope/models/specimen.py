"""The smallest inputs that reach every part of a model: what a family and a read-out are proved on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from stratoscope.models.lm import LM


def specimen(lm: LM) -> Any:
    """Two short prompts of different length, or one small picture of noise for a model that reads no tokens."""
    if lm.family.vision_only:
        return {"pixel_values": noise(lm.model, lm.layout.config())}
    return prompts(lm.model)


def prompts(model: Any) -> list[list[int]]:
    """Two short prompts of different length, of ids spread over the vocabulary, without the special ones."""
    config = model.config.get_text_config()
    special = {v for name, v in vars(config).items() if name.endswith("_token_id") and isinstance(v, int)}
    special |= {v for name, v in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))}
    free = [(7 + 31 * i) % config.vocab_size for i in range(4 * len(special) + 40)]
    free = [i for i in dict.fromkeys(free) if i not in special]
    return [free[:5], free[5:8]]


def noise(model: Any, config: Any) -> torch.Tensor:
    """(1, channel, height, width) pixels of the size that a vision config names."""
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    steps = torch.arange(1, channels * height * width + 1, dtype=torch.float32)
    return torch.sin(steps * steps).reshape(1, channels, height, width).to(model.device, model.dtype)
