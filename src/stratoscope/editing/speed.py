"""Speed: how much sooner an edited model has read a text, and says the next tokens.

Paper: llm-drop

    seconds[run, what, example] = the fastest of `repeats` runs, the two models taken in turn
    gain[what, example]         = seconds[plain] / seconds[edited]

what: "text", the whole text at once into an empty cache, and "token", one more token with the text
in the cache, the mean of `tokens`. The fastest run is taken because whatever else a machine does
only adds time. The first run of each warms up and does not count.

Reads as: what an edit that leaves out work (`editing.drop_modules`) is good for on this machine.
Does not show what it is on another one; wall time is no seeded result, so this is no `measure`, and
`itself` (the plain model in the edit's place) says how far two equal models differ here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

AXES = {
    "run": "the model as it is (plain), inside an edit (edited), or as it is once more (itself)",
    "what": "what a model takes time for: reading a whole text, or one more token",
}
RUNS, WHAT = ("plain", "edited", "itself"), ("text", "token")


@torch.no_grad()
def compare(lm: LM, inputs: Any, edit: Edit, *, tokens: int = 8, repeats: int = 5) -> xr.Dataset:
    """seconds (run, what, example); gain, itself (what, example): the plain model's over the
    edited's, and over its own; cache (run, example): bytes of keys and values that are kept.

    inputs: texts, each run alone. tokens: how many are said after each, its last one again and
    again. repeats: counted runs. Raises SiteError for a model without a cache, InputError for an
    edit of another model or fewer than one token or repeat.
    """
    if edit.lm.model is not lm.model:
        raise InputError("edit: one of another model; make it for this one.")
    if min(tokens, repeats) < 1:
        raise InputError(f"tokens={tokens}, repeats={repeats}: at least one of each.")
    if not lm.model.can_generate() or lm.model.config.is_encoder_decoder:
        raise SiteError(f"{lm.family.name} does not say one token after another with a cache.")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    rows = [row[real] for row, real in zip(ids, mask)]
    contexts = dict(zip(RUNS, (nullcontext(), edit, nullcontext())))
    seconds = torch.full((len(RUNS), len(WHAT), len(rows)), torch.inf, dtype=torch.float64)
    cached = torch.zeros(len(RUNS), len(rows), dtype=torch.long)
    for example, row in enumerate(rows):
        for repeat in range(repeats + 1):
            for at, context in enumerate(contexts.values()):
                took, cached[at, example] = _once(
                    lm, row[None].to(lm.model.device), context, tokens
                )
                if repeat:  # the first warms up
                    seconds[at, :, example] = torch.minimum(seconds[at, :, example], took)
    plain, edited, again = seconds
    axes_of, axes = ("what", "example"), ("run", "what", "example")
    return dataset(
        {
            "seconds": (axes, seconds),
            "gain": (axes_of, plain / edited),
            "itself": (axes_of, plain / again),
            "cache": (("run", "example"), cached),
        },
        method="editing.speed",
        provenance=lm.provenance,
        settings={"edit": edit.note, "tokens": tokens, "repeats": repeats},
        coords={"run": list(RUNS), "what": list(WHAT)}
        | ({"example_text": batch.coords()["example_text"]} if batch.tokens else {}),
    )


def held(cache: Any) -> Sequence[int]:
    """Bytes of keys and values of each layer of a cache, 0 for one that holds none."""
    return [
        sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
        if isinstance(layer.keys, Tensor)
        else 0
        for layer in cache.layers
    ]


def _once(
    lm: LM, ids: Tensor, context: AbstractContextManager[Any], tokens: int
) -> tuple[Tensor, int]:
    """Seconds for the text and for one more token, and bytes in the cache after the text."""
    with context:
        _wait(ids)
        began = time.perf_counter()
        cache = lm.model(ids, use_cache=True).cache
        _wait(ids)
        read = time.perf_counter()
        size = sum(held(cache))
        going = time.perf_counter()
        for _ in range(tokens):
            lm.model(ids[:, -1:], cache=cache, use_cache=True)
        _wait(ids)
        done = time.perf_counter()
    return torch.tensor([read - began, (done - going) / tokens], dtype=torch.float64), size


def _wait(at: Tensor) -> None:
    """A GPU works on after the call has returned; the clock has to wait for it."""
    if at.device.type == "cuda":
        torch.cuda.synchronize(at.device)
