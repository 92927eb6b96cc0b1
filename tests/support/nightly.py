"""Which of many alike are tried in every run; the others are marked `nightly`.

`make test-changed` tries all of them where models/ or engine/ changed, `make test-all` always.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# One architecture for each kind of structure that the others repeat.
BY_DAY = frozenset(
    # learned positions, ALiBi, parallel blocks, multipliers, low-rank attention, per-layer inputs
    "gpt2 falcon gptj granite minicpm3 gemma3n_text "
    # experts: all layers, some layers, grouped and shared
    "qwen2_moe deepseek_v3 dbrx "
    # state spaces, and hybrids of one or several kinds of layer
    "mamba2 jamba falcon_h1 nemotron_h qwen3_next recurrent_gemma cpmant "
    # encoders of text and of pictures; vision-language models
    "electra esm deberta-v2 mpnet roformer dinov2 beit dinov3_vit siglip2 "
    "qwen3_vl gemma3 paligemma internvl blip-2 qwen2_audio".split()
)


def by_night(names: Iterable[Any], by_day: Iterable[Any] = BY_DAY) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: those not in `by_day` are `nightly`."""
    day = set(by_day)
    return [n if n in day else pytest.param(n, marks=pytest.mark.nightly) for n in names]
