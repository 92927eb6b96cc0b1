"""What stands beside and around the tokens that a user hands over, honoured or refused: masks,
embeddings, options, and what a tokenizer adds to a text of its own accord.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError


def mask_rows(mask: Any) -> list[list[bool]] | None:
    """An attention mask as rows of True at real tokens. Raises InputError for one that cannot be
    honoured."""
    if mask is None:
        return None
    rows = mask.tolist() if hasattr(mask, "tolist") else list(mask)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    rows = rows if all(isinstance(row, (list, tuple)) for row in rows) else [rows]
    if any(value not in (0, 1) for row in rows for value in row):
        raise InputError(
            f"attention_mask of shape {shape(mask)} is not one 0 or 1 for each token, (example, "
            "position). "
            "To hide keys from queries use `intervene(lm, knock_out(layer, queries, keys))`."
        )
    for number, row in enumerate(rows):
        start, end = span(row)
        hidden = next((place for place in range(start, end) if not row[place]), None)
        if hidden is not None:
            raise InputError(
                f"attention_mask hides position {hidden} of prompt {number}, between tokens that "
                "it "
                "shows. Leave that token out of the ids, or keep it and cut attention to it: "
                f"`intervene(lm, knock_out('*', None, {hidden - start}))`."
            )
    return [[bool(value) for value in row] for row in rows]


def span(row: Sequence[Any]) -> tuple[int, int]:
    """Where a row's real tokens begin, and where they have ended."""
    real = [place for place, value in enumerate(row) if value]
    return (real[0], real[-1] + 1) if real else (0, 0)


def shape(rows: Any) -> tuple[int, int] | tuple[()]:
    """(example, position) of a table that may be a tensor, an array or lists; () when rows differ
    in length."""
    size = getattr(rows, "shape", None)
    if size is None:
        rows = rows if all(hasattr(row, "__len__") for row in rows) else [rows]
        widths = {len(row) for row in rows}
        return (len(rows), widths.pop()) if len(widths) == 1 else ()
    return tuple(size[:2]) if len(size) > 1 else (1, *size)


def tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All model inputs but ids and mask, as tensors. Raises InputError for a cache, an option, or
    what is no tensor."""
    return {
        name: _tensor(name, value)
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask") and value is not None
    }


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, (bool, int, float)):
        raise InputError(
            f"`{name}={value!r}` is an option, not an input: give it as `lm(inputs, "
            f"{name}={value!r})`."
        )
    if not isinstance(value, Tensor) and ("cache" in name or "key_values" in name):
        raise InputError(
            f"`{name}`: a run that goes on from a cache would not count positions from the "
            "prompt's first token. "
            f"Give whole prompts, or use `generate`."
        )
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "a mapping holds the model's inputs (input_ids, attention_mask, pixel_values, ...), "
            "and this one has "
            f"{name!r}: {value!r:.40}. Pass a text as it is, without a mapping."
        ) from None


def embeddings(
    x: Tensor, mask: list[list[bool]] | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Embeddings (example, position, dim) with padding moved to the right, and where they are
    real."""
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(
            f"inputs_embeds are floats (example, position, dim); got {tuple(x.shape)} {x.dtype}."
        )
    rows = [[True] * x.shape[1]] * len(x) if mask is None else mask
    spans = [span(row) for row in rows]
    if shape(rows) != tuple(x.shape[:2]) or any(start == end for start, end in spans):
        raise InputError(
            f"attention_mask has shape {shape(rows)} beside inputs_embeds {tuple(x.shape)}: each "
            "embedding needs its "
            "own 0 or 1, and each prompt at least one 1."
        )
    starts, ends = torch.tensor(spans, device=x.device).T
    width = max(end - start for start, end in spans)
    if limit is not None and width > limit:
        raise InputError(
            f"a prompt has {width} embeddings; this model's context is {limit}: shorten it."
        )
    along = torch.arange(width, device=x.device)
    index = (along + starts[:, None]) % x.shape[1]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), along < (ends - starts)[
        :, None
    ]


def texts(inputs: Any) -> list[str]:
    """The prompts where they are texts, else none."""
    inputs = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    listed = [inputs] if isinstance(inputs, str) else inputs
    return [x for x in listed if isinstance(x, str)] if isinstance(listed, Sequence) else []


def as_meant(
    rows: list[list[int]],
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    predicts: bool,
) -> tuple[list[list[int]], tuple[str, ...]]:
    """The rows without a first token that the text had already (a chat template writes it), and,
    where what follows is asked, without the end that the tokenizer put behind the text; and notes
    that say so."""
    firsts = [tokenizer.bos_token_id, tokenizer.cls_token_id]
    ends = [tokenizer.eos_token_id, tokenizer.sep_token_id] if predicts else []
    rows_meant, notes = [], {}
    for row, text in zip(rows, prompts):
        doubled = row[:1] == row[1:2] and row[0] in firsts
        if doubled or (len(row) > 1 and row[-1] in ends):
            own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if doubled and row[1 : 1 + len(own)] == own:
                notes[
                    f"The text begins with {tokenizer.decode(row[0])!r} itself: the tokenizer's "
                    "own was left out."
                ] = 1
                row = row[1:]
            if row[-1] in ends and own and own[-1] != row[-1]:
                notes[
                    f"The tokenizer's {tokenizer.decode(row[-1])!r} after the text was left out: "
                    "it is to go on."
                ] = 1
                row = row[:-1]
        rows_meant.append(row)
    return rows_meant, tuple(notes)
