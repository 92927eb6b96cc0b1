"""Texts that become parts of one prompt: without the tokens that a tokenizer puts around a whole
text.

    [*before(lm), *one, *between, *two]         what the model would be given, were the joined text
                                                one prompt

A tokenizer of Llama or Gemma begins every text with <s>, BERT's puts it between [CLS] and [SEP].
Joined as they come, these would stand in the middle of the prompt, be read, counted and looked at.
"""

from __future__ import annotations

from typing import Any

from stratoscope.models.beside import texts
from stratoscope.models.lm import LM


def before(lm: LM) -> list[int]:
    """The token that the tokenizer begins every text with ([bos] or [cls]), or nothing."""
    if lm.tokenizer is None:
        return []
    firsts = (lm.tokenizer.bos_token_id, lm.tokenizer.cls_token_id)
    return [i for i in lm.tokenizer("")["input_ids"][:1] if i in firsts]


def pieces(lm: LM, inputs: Any) -> list[list[int]]:
    """Each text's own ids; ids, tensors and chats are taken as they are given. Raises InputError as
    `LM.batch` does."""
    ids, mask = lm.batch(inputs).text
    tokenizer, given = lm.tokenizer, texts(inputs)
    if tokenizer is not None and given:
        return [list(row) for row in tokenizer(list(given), add_special_tokens=False)["input_ids"]]
    return [row[real].tolist() for row, real in zip(ids, mask)]
