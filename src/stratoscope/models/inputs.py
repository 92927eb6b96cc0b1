"""What people pass as prompts, read as one row of token ids for each: texts, ids, tables, arrays,
chats.

What cannot be read is refused with what was found and what to give instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError

_FORMS = (
    "give a prompt, a list of prompts, token ids (example, position), a chat as a list of "
    "{'role': ..., 'content': ...}, or a mapping of model inputs (input_ids, attention_mask, ...)"
)


def rows_of(inputs: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Each prompt's token ids. Raises InputError for what is neither texts, ids nor chats."""
    inputs = _plain(inputs)
    if isinstance(inputs, str) or _is_chat(inputs):
        inputs = [inputs]
    if isinstance(inputs, (bytes, bytearray)):
        raise InputError(
            "inputs are bytes: decode them to text first, e.g. prompt.decode('utf-8')."
        )
    if not isinstance(inputs, Sequence) or not inputs:
        received = f"{type(inputs).__name__} {inputs!r:.80}"
        raise InputError(
            f"inputs must be prompts, token ids or model inputs; got {received}: {_FORMS}."
        )
    if all(isinstance(x, str) for x in inputs):
        return _of_texts(inputs, tokenizer)
    if all(map(_is_chat, inputs)):
        return [_of_chat(chat, tokenizer) for chat in inputs]
    return table(inputs)


def table(rows: Any) -> list[list[int]]:
    """Token ids (or a mask of them): one row, or several, as several. Raises InputError."""
    rows = _plain(rows)
    if all(isinstance(x, Integral) for x in rows):
        return [[int(x) for x in rows]]
    return [_row(number, row) for number, row in enumerate(map(_plain, rows))]


def _row(number: int, row: Any) -> list[int]:
    if isinstance(row, str):
        raise InputError("inputs mix text and token ids: give one kind for all prompts.")
    if isinstance(row, (bytes, bytearray)):
        raise InputError(f"prompt {number} is bytes: decode it to text first.")
    if not isinstance(row, Sequence):
        raise InputError(f"prompt {number} is {row!r:.60} ({type(row).__name__}): {_FORMS}.")
    wrong = next((x for x in row if not isinstance(_plain(x), Integral)), None)
    if isinstance(wrong, str):
        raise InputError(
            f"prompt {number} is a list of texts, {row!r:.60}: give one text for each."
        )
    if wrong is not None:
        raise InputError(
            f"prompt {number} holds {wrong!r:.60}, where token ids are integers: {_FORMS}."
        )
    return [int(x) for x in row]


def _plain(x: Any) -> Any:
    """Tensors, arrays and table columns as lists. Raises InputError for ids that are no
    integers."""
    if not hasattr(x, "tolist"):
        return x
    shape, kind = tuple(getattr(x, "shape", ())), str(getattr(x, "dtype", ""))
    if "float" in kind or len(shape) > 2:
        raise InputError(f"token ids are integers, (example, position); got shape {shape} {kind}.")
    return x.tolist() or ([[]] if len(shape) == 2 else [])


def _of_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    if tokenizer is None:
        raise InputError(
            "this model was wrapped without a tokenizer: pass token ids instead of text."
        )
    for number, text in enumerate(texts):
        if not text:
            raise InputError(f"prompt {number} is empty: there is no token to explain.")
        if any(0xD800 <= ord(sign) < 0xE000 for sign in text):
            raise InputError(
                f"prompt {number}, {text!r:.60}, holds half of a surrogate pair, which is no text: "
                f"decode its source as UTF-8 (errors='replace' where it is damaged)."
            )
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]


def _is_chat(x: Any) -> bool:
    """A list of messages, {"role": ..., "content": ...}."""
    return (
        isinstance(x, (list, tuple))
        and bool(x)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in x)
    )


def _of_chat(
    chat: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """The chat as the model's own template writes it, up to where the model goes on."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "inputs are chat messages, and this model's tokenizer has no chat template: write the "
            "conversation as one text."
        )
    if not all(isinstance(turn.get("content"), str) for turn in chat):
        raise InputError(
            "a chat message's content is text here; for pictures, let the model's processor make "
            "the "
            "inputs and pass its mapping (input_ids, pixel_values, ...)."
        )
    open_end = chat[-1]["role"] == "assistant"  # an answer that has begun is gone on with
    ids = tokenizer.apply_chat_template(
        [dict(turn) for turn in chat],
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not open_end,
        continue_final_message=open_end,
    )
    return [int(token) for token in ids]
