"""Greedy generation with the KV cache, with traces and interventions active: forward pass 0 is the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import FamilyError, InputError
from stratoscope.models.lm import LM
from stratoscope.models.taps import StopForward


@torch.no_grad()
def generate(lm: LM, inputs: Any, *, tokens: int = 20, **options: Any) -> list[Tensor]:
    """Up to `tokens` new ids for each example, as Hugging Face's `generate` gives them, greedy unless options say other.

    Use it inside `with trace(..., stop=False)` or `with intervene(...)`: `steps` and the trace's steps count forward
    passes, and named positions mean an example's own tokens whatever the padding. Raises InputError for a model that
    cannot generate, FamilyError for one whose cache cannot be followed.
    """
    if not lm.model.can_generate():
        raise InputError(f"{type(lm.model).__name__} cannot generate text.")
    batch = lm.batch(inputs)
    arguments, shift = batch.left_padded()
    pad = lm.tokenizer.pad_token_id if lm.tokenizer is not None else None
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": pad if pad is not None else 0} | options
    if not settings["use_cache"]:
        raise InputError("use_cache=False: steps are forward passes that go on from the cache, so it is needed.")
    with lm.taps.running(batch, shift):
        try:
            ids = lm.model.generate(**arguments, max_new_tokens=tokens, **settings)
        except StopForward:
            raise InputError("a trace that stops early cannot watch generation: use trace(..., stop=False).") from None
        new = ids[:, arguments["input_ids"].shape[1] :]
        if lm.taps.listening and lm.taps.run.step == 0 and new.shape[1] > 1:
            raise FamilyError(
                f"{type(lm.model).__name__} took more than one forward pass without a cache that stratoscope can see: "
                "positions and steps would be wrong from the second on."
            )
    ends = settings.get("eos_token_id", lm.model.generation_config.eos_token_id)
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i for i, t in enumerate(row.tolist()) if t in ends), len(row))] for row in new]
