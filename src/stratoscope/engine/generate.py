"""Greedy generation with the KV cache, with traces and interventions active: forward pass 0 is the
prompt."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import FamilyError, InputError
from stratoscope.models import longrope
from stratoscope.models.lm import LM
from stratoscope.models.taps import StopForward

# options that cannot be honoured, and what to do
_REFUSED = {
    "max_new_tokens": "say how many new tokens with `tokens=`",
    "max_length": "say how many new tokens with `tokens=`",
    "return_dict_in_generate": "the new ids are returned; see what happens inside with `trace(..., "
    "stop=False)`",
    "prefill_chunk_size": "the prompt must be one forward pass, step 0, so that positions in it "
    "can be named",
    "past_key_values": "a run that goes on from a cache would count positions anew: give whole "
    "prompts",
    "inputs_embeds": "give prompts or token ids",
}


@torch.no_grad()
def generate(lm: LM, inputs: Any, *, tokens: int = 20, **options: Any) -> list[Tensor]:
    """Up to `tokens` new ids for each example, as Hugging Face's `generate` gives them, greedy
    unless options say other.

    Use it inside `with trace(..., stop=False)` or `with intervene(...)`: `steps` and the trace's
    steps count forward passes, and named positions mean an example's own tokens whatever the
    padding. With beams or several sequences for each prompt, examples are still the prompts, all of
    whose rows are meant; a trace holds every row. Raises InputError for a model that cannot
    generate and for options that would be lost, FamilyError for a cache that cannot be followed.
    """
    if not lm.model.can_generate():
        raise InputError(f"{type(lm.model).__name__} cannot generate text.")
    if tokens < 1:
        raise InputError(f"generate(..., tokens={tokens}): ask for at least one new token.")
    for name, reason in _REFUSED.items():
        if options.get(name):
            raise InputError(f"generate(..., {name}={options[name]!r}): {reason}.")
    batch = lm.batch(inputs)
    _refuse_turning(lm, batch.lengths.tolist(), tokens)
    arguments, shift = batch.left_padded()
    pad = lm.tokenizer.pad_token_id if lm.tokenizer is not None else None
    settings = {
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": pad if pad is not None else 0,
    } | options
    if not settings["use_cache"]:
        raise InputError(
            "use_cache=False: steps are forward passes that go on from the cache, so it is needed."
        )
    settings |= {"return_dict_in_generate": False, "prefill_chunk_size": None}
    # Transformers compiles by itself on accelerators, and hooks would not run
    settings |= {"disable_compile": True}
    heard = {site.point for pair in lm.taps.listening for table in pair for site in table}
    if "logits" in heard and "logits_to_keep" in signature(lm.model.forward).parameters:
        # else only the last position's are computed, and others could not be named
        settings |= {"logits_to_keep": 0}
    config = settings.get("generation_config") or lm.model.generation_config
    rows = max(
        settings.get(name, getattr(config, name, None)) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    with lm.taps.running(batch, shift, rows):
        try:
            ids = lm.model.generate(**arguments, max_new_tokens=tokens, **settings)
        except StopForward:
            raise InputError(
                "a trace that stops early cannot watch generation: use trace(..., stop=False)."
            ) from None
        prompt = arguments.get("decoder_input_ids", arguments.get("input_ids"))
        prompt = prompt.repeat_interleave(len(ids) // len(prompt), dim=0)
        width = prompt.shape[1]  # Whisper's own `generate` leaves the prompt out
        new = ids[:, width:] if torch.equal(ids[:, :width], prompt) else ids
        if lm.taps.listening and lm.taps.run.step == 0 and new.shape[1] > 1:
            raise FamilyError(
                f"{type(lm.model).__name__} took more than one forward pass without a cache that "
                "stratoscope can see: "
                "positions and steps would be wrong from the second on."
            )
    ends = settings.get("eos_token_id", lm.model.generation_config.eos_token_id)
    ends = set(ends if isinstance(ends, list) else [ends])
    return [
        row[: next((i for i, t in enumerate(row.tolist()) if t in ends), len(row))] for row in new
    ]


def _refuse_turning(lm: LM, lengths: list[int], tokens: int) -> None:
    """The last new token is not read, so a text grows by one less."""
    most = longrope.limit(lm.layout.config())
    if most is None:
        return
    for n in lengths:
        if n <= most < n + tokens - 1:
            raise InputError(
                f"a prompt of {n} tokens and {tokens} more: above {most} this model (LongRoPE) "
                "turns all positions by other angles, so that keys in its cache would be no longer "
                f"those of the text. Ask for at most {most - n + 1}, or begin above {most}."
            )
