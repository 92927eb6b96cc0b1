"""Patchscope: what the model itself says that a hidden state stands for.

Paper: back-patching (Ghandeharioun, Caciularu, Pearce, Dixon and Geva 2024, arXiv:2401.06102)

    h[depth]  = resid[depth, position] of the prompt                   depth: layers it has passed
    said[depth] = the likeliest token after `into`, run with resid_pre[layer, place] <- h[depth]

`into` is another prompt, which asks for the word at its placeholder: by default one that repeats
words, "cat -> cat; ...; ? ->". The state takes the placeholder's place at `layer`, by default the
layer that would have read it (the paper's l* = l), and what the model then says names the state.

Reads as: the state holds what the model says of it, in the basis that later layers read. Does not
show that the model uses it in its own prompt; and a reader that says nothing may be a weak model or
an unlucky `into`: read states of words that are known first (a name at its own token), and at depth
0 a word is repeated from its embedding alone.

Cost: two sweeps of `into`, a cell for each prompt and depth; it runs from the placeholder on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words, target
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset

INTO, PLACEHOLDER = "cat -> cat; 1135 -> 1135; hello -> hello; ? ->", "?"


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    position: int | Sequence[int] = -1,
    into: str | Sequence[int] = INTO,
    place: int | None = None,
    layer: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """token (example, depth), what is said, and answer_rank (example, depth), how many tokens are
    said sooner than the answer; 0 is the top.

    answer: the entity looked for, one token (default: what the model says after its own prompt).
    position: the token of the prompt whose state is read, one for all prompts or one each. into:
    the prompt that asks, a text or its ids. place: where in `into` the state is put, default its
    one token "?". layer: the one that reads it, default the state's own; the state after the last
    layer then has none, and is left out. progress: called with (results done, results in all).
    Raises InputError for a layer, a place or a placeholder that is not there, SiteError for a model
    without a vocabulary.
    """
    if not lm.dims.vocab or lm.readout.kind != "vocab":
        raise SiteError(f"{lm.family.name} has no vocabulary read-out: it has no words to say.")
    if layer is not None and not 0 <= layer < lm.dims.layers:
        raise InputError(f"layer={layer}: choose 0 to {lm.dims.layers - 1}, or None.")
    batch = lm.batch(inputs)
    wanted = target(lm, batch, answer, single="a Patchscope is asked for the next token")
    given = [position] * len(batch) if isinstance(position, int) else list(position)
    states = _states(lm, batch, given)
    depths = range(lm.dims.layers + (layer is not None))
    rows = [into if isinstance(into, str) else list(into)] * len(batch)
    asks = lm.batch(rows)
    spot = _spot(lm, asks.text[0][0].tolist(), place)
    cells = [
        replaced(
            f"layers.{depth if layer is None else layer}.resid_pre",
            states[depth][:, None],
            positions=spot,
        )
        for depth in depths
    ]

    def token_and_rank(logits: Tensor, example: Tensor) -> Tensor:
        own = logits.gather(1, wanted.answer[example.cpu()].to(logits.device)[:, None])
        # a sweep has one number a cell: the first token and the answer's rank are its two parts
        return torch.complex(logits.argmax(dim=-1).float(), (logits > own).sum(dim=1).float())

    pairs = sweep(lm, asks, cells, token_and_rank, progress=progress)
    first, ranks = pairs.real, pairs.imag
    axes = ("example", "depth")
    texts = np.vectorize(lambda i: token_text(lm.tokenizer, int(i)), otypes=[object])
    return dataset(
        {"token": (axes, texts(first.T.cpu())), "answer_rank": (axes, ranks.T.float().cpu())},
        method="tokens.patchscope",
        provenance=lm.provenance,
        settings={
            "into": into if isinstance(into, str) else list(into),
            "place": spot,
            "layer": "the state's own" if layer is None else layer,
            "position": position if isinstance(position, int) else given,
        },
        coords={
            "depth": list(depths),
            "example_text": batch.coords()["example_text"],
            "answer": wanted.coords["answer"],
        },
        notes=" ".join(wanted.notes),
    )


def _states(lm: LM, batch: Any, position: Sequence[int]) -> list[Tensor]:
    """The residual stream (example, dim) of one token of each prompt, at every depth."""
    where = torch.tensor(position)[:, None]
    seen = capture(lm, batch, "layers.0.resid_pre", "layers.*.resid_post", positions=where)
    first, rest = seen["layers.0.resid_pre"], seen.stack("layers.*.resid_post")
    return [x.reshape(len(batch), -1) for x in (first, *rest)]


def _spot(lm: LM, ids: Sequence[int], place: int | None) -> int:
    """The position in the asking prompt that the state takes."""
    if place is not None:
        if not -len(ids) <= place < len(ids):
            raise InputError(f"place={place}: `into` has {len(ids)} tokens.")
        return place % len(ids)
    texts = [token_text(lm.tokenizer, i).strip() for i in ids]
    places = [i for i, text in enumerate(texts) if text == PLACEHOLDER]
    if len(places) != 1:
        raise InputError(
            f"`into` has {len(places)} tokens {PLACEHOLDER!r} among {texts}: a state is put at the "
            "one there is. Write it once, as a word of its own, or give `place`."
        )
    return places[0]
