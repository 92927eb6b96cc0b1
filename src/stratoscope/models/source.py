"""Encoder-decoders: what the encoder reads, and what the decoder has said so far.

The decoder is the main stack, so its ids are a batch's ids; what the encoder reads is the batch's
`source`. A text goes to the encoder, and the decoder begins with its start token, or with that and
the `target`, of which nothing is the end: what would follow is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stratoscope.errors import InputError, SiteError
from stratoscope.models import beside
from stratoscope.models.inputs import rows_of

if TYPE_CHECKING:
    from stratoscope.models.lm import LM


def apart(inputs: Any, target: Any) -> tuple[Any, Any]:
    """The encoder's inputs and the decoder's, where a mapping holds both (a processor's or a
    collator's), else None for the latter. Raises InputError for what cannot be honoured."""
    if not isinstance(inputs, Mapping):
        return inputs, None
    for name in ("labels", "decoder_inputs_embeds", "encoder_outputs"):
        if inputs.get(name) is not None:
            raise InputError(
                f"`{name}` beside an encoder's inputs: give what the decoder has said as "
                "`decoder_input_ids`, or a text as `lm.batch(inputs, target=...)`."
            )
    given = inputs.get("decoder_input_ids")
    if given is not None and target is not None:
        raise InputError("inputs hold decoder_input_ids and a target was given: give one of them.")
    mask = inputs.get("decoder_attention_mask")
    own = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    return own, None if given is None else {"input_ids": given, "attention_mask": mask}


def target_ids(lm: LM, target: Any, examples: int) -> list[list[int]]:
    """The decoder's ids of each example: its start token, then the target without an end of its
    own. target: None, texts or ids. Raises InputError for another number of targets."""
    start = _start(lm)
    if target is None:
        return [[start]] * examples
    texts = beside.texts(target)
    if texts and lm.tokenizer is not None:
        rows = [list(row) for row in lm.tokenizer(text_target=texts)["input_ids"]]
    else:
        rows = rows_of(target, lm.tokenizer)
    if len(rows) != examples:
        raise InputError(
            f"{examples} inputs and {len(rows)} targets: give one target for each input."
        )
    ends = [getattr(lm.tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
    rows = [row[:-1] if texts and row and row[-1] in ends else row for row in rows]
    return [row if row[:1] == [start] else [start, *row] for row in rows]


def _start(lm: LM) -> int:
    holders = (lm.layout.config(), getattr(lm.model, "generation_config", None))
    starts = (getattr(held, "decoder_start_token_id", None) for held in holders)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise InputError(
            "this model's config names no decoder_start_token_id, so where its decoder begins is "
            "unknown: give `decoder_input_ids` beside the encoder's inputs."
        )
    return int(start)


def refuse(lm: LM, why: str) -> None:
    """Raise SiteError, saying why, for a model whose layers read an encoder beside the prompt."""
    if lm.family.source:
        raise SiteError(
            f"{lm.family.name}'s decoder reads its {lm.family.source} by cross-attention: {why}."
        )
