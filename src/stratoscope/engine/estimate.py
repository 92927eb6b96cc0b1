"""How long a measure of many passes will take, said before it starts.

    seconds = passes * tokens * (seconds of one pass over a few tokens / those tokens)

Small work is not timed at all. Attention, whose cost grows with the square of the length, is left
out, so a very long prompt takes longer than is said.
"""

from __future__ import annotations

import time
import warnings

import torch

from stratoscope.engine.trace import capture
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

SLOW = 60.0  # seconds: what takes longer is announced
_WORK = 2e12  # floating-point operations: less is done within seconds, and not timed
_SAMPLE = 128  # tokens of the pass that is timed


class SlowWarning(UserWarning):
    """What has been asked for will take a minute or more."""


@torch.no_grad()
def announce(lm: LM, batch: Batch, passes: int | float, what: str, instead: str) -> float:
    """Warn with SlowWarning when `passes` passes over the batch would take more than SLOW seconds.

    what: the subject of the sentence. instead: what to do to have it sooner. Returns the seconds
    foreseen; 0 for work too small to be timed.
    """
    if batch.ids is None:
        return 0.0
    tokens = int(batch.lengths.sum())
    layers = sum(p.numel() for n, p in lm.model.named_parameters() if "embed" not in n)
    if 2.0 * layers * tokens * passes < _WORK:
        return 0.0
    ids, mask = batch.text
    heard = None if batch.source is None else batch.source.example(0)
    short = (ids[:1, :_SAMPLE], mask[:1, :_SAMPLE], {}, (batch.tokens[0][:_SAMPLE],))
    sample = Batch(*short, source=heard)
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    began = time.perf_counter()
    float(capture(lm, sample if not batch.extra else batch, last, positions=-1)[last].sum())
    each = (time.perf_counter() - began) / (int(sample.lengths[0]) if not batch.extra else tokens)
    seconds = each * tokens * passes
    if seconds > SLOW:
        warnings.warn(
            f"{what} runs the model about {passes:,.0f} times over {tokens:,} tokens, about "
            f"{_spoken(seconds)} here. {instead}",
            SlowWarning,
            stacklevel=3,
        )
    return seconds


def _spoken(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
