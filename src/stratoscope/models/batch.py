"""A batch: token ids in one canonical layout, so that padding can never reach a result.

Whatever side the user padded on, ids are stored right-padded: position 0 is an example's first real
token. With a mask, right padding is exact for causal and bidirectional models and needs no position
ids. Only generation pads left, inside `engine.generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stratoscope.errors import InputError
from stratoscope.models import beside, pictures
from stratoscope.models.inputs import rows_of, table
from stratoscope.models.text import apart, joined, token_texts


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    ids: (example, position) token ids, right-padded; None for a vision-only model and for
    embeddings. mask: (example, position), True at real tokens. `extra`: pixel_values and the like,
    passed on as they are. tokens: the readable string of every real token. `image`: which positions
    hold image tokens, or those of sound. words: whether tokens are words or word pieces, with a
    space between them in the text. notes: what was assumed when the inputs were read, for a person.
    source: what the encoder of an encoder-decoder reads; then ids and mask are the decoder's.
    tower: which tower reads this, "" for the main stack. signal: of series of numbers, the name in
    `extra` under which they stand; `mask` then tells of positions, not of steps. copies: rows of
    each example.
    """

    ids: Tensor | None
    mask: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: tuple[tuple[str, ...], ...] = ()
    image: Tensor | None = None
    words: bool = False
    notes: tuple[str, ...] = ()
    source: Batch | None = None
    tower: str = ""
    signal: str = ""
    copies: int = 1

    def __len__(self) -> int:
        held = self.ids if self.ids is not None else self.mask
        return int((next(iter(self.extra.values())) if held is None else held).shape[0])

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """ids and mask. Raises InputError for inputs that hold no tokens."""
        if self.ids is None or self.mask is None:
            raise InputError(
                "these inputs hold no token ids (images, series, embeddings): this needs a prompt."
            )
        return self.ids, self.mask

    @property
    def lengths(self) -> Tensor:
        """(example,) number of real tokens. Raises InputError for inputs that hold none."""
        if self.mask is None:
            raise InputError("these inputs hold no tokens (images only): this needs a prompt.")
        return self.mask.sum(dim=1)

    @cached_property
    def host_lengths(self) -> Tensor:
        """`lengths` on the host: read off the device once, for whoever counts positions there."""
        return self.lengths.cpu()

    @property
    def padded(self) -> bool:
        return self.mask is not None and not bool(self.mask.all())

    @property
    def texts(self) -> tuple[str, ...]:
        """Each example's whole text, as its tokens spell it."""
        return tuple(joined(tokens, words=self.words) for tokens in self.tokens)

    def read_by(self, tower: str) -> Batch | None:
        """What a tower reads, position by position; None where nobody counts its positions here
        (the patches of a picture)."""
        if tower == self.tower:
            return self
        return None if self.source is None else self.source.read_by(tower)

    def forward_arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for the Hugging Face forward."""
        decoder = "" if self.source is None else "decoder_"
        text = {} if self.ids is None else {f"{decoder}input_ids": self.ids}
        real = None if self.signal else self.mask  # that of a series stands in extra
        mask = {} if real is None else {f"{decoder}attention_mask": real.long()}
        source = {} if self.source is None else self.source.forward_arguments()
        return source | text | mask | dict(self.extra)

    def coords(
        self, axis: str = "position", name: str = "text"
    ) -> dict[str, tuple[tuple[str, ...], list]]:
        """Coordinates for a labelled result: what each position is called along `axis` ("" at
        padding), and each whole text ("" for a picture, which has none)."""
        if not self.tokens:
            return {"example_text": (("example",), [""] * len(self))}
        width = max(map(len, self.tokens), default=0)
        rows = [[*tokens, *[""] * (width - len(tokens))] for tokens in self.tokens]
        return {
            name: (("example", axis), rows),
            "example_text": (("example",), list(self.texts)),
        }

    def to(self, device: torch.device) -> Batch:
        """This batch on a device; itself where all of it is there."""
        held = (self.ids, self.mask, self.image, *self.extra.values())
        there = all(x is None or x.device == device for x in held)
        if there and (self.source is None or self.source.to(device) is self.source):
            return self
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        extra = {name: move(x) for name, x in self.extra.items()}
        return replace(
            self,
            ids=move(self.ids),
            mask=move(self.mask),
            image=move(self.image),
            extra=extra,
            source=None if self.source is None else self.source.to(device),
        )

    def example(self, index: int) -> Batch:
        """One example alone, without padding, with its own pictures. Raises InputError where these
        are not known."""
        if len(self) == 1:
            return self
        if self.source is not None:
            own = replace(self, source=None).example(index)
            return replace(own, source=self.source.example(index))
        if self.signal:
            return self._series(index)
        n = 0 if self.mask is None else int(self.lengths[index])
        here = slice(index, index + 1)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[here, :n]

        shape = (len(self),) if self.mask is None else tuple(self.mask.shape)
        return replace(
            self,
            ids=cut(self.ids),
            mask=cut(self.mask),
            extra=pictures.of_example(self.extra, self.image, index, shape=shape, length=n),
            tokens=self.tokens[here],
            image=cut(self.image),
            copies=1,
        )

    def _series(self, index: int) -> Batch:
        """One series alone, without padding."""
        here = slice(index, index + 1)
        extra = {name: x[here] for name, x in self.extra.items()}
        steps = extra.pop("attention_mask", None)
        if steps is not None:
            extra[self.signal] = extra[self.signal][:, : int(steps.sum())]
        mask = None if self.mask is None else self.mask[here, : int(self.lengths[index])]
        return replace(self, mask=mask, extra=extra, tokens=self.tokens[here])

    def left_padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """Forward arguments with padding on the left, and how far each example moved: (example,).
        What an encoder reads stays as it is; decoders are not moved, since some count positions
        from the first place: InputError where their ids differ in number."""
        ids, mask = self.text
        if self.source is not None:
            if self.padded:
                raise InputError(
                    f"targets of {self.lengths.tolist()} tokens in one batch: a decoder is not "
                    "padded on the left, so generate from those of one length at a time."
                )
            return self.forward_arguments(), torch.zeros_like(self.lengths)
        width = ids.shape[1]
        shift = width - self.lengths
        index = (torch.arange(width, device=ids.device) - shift[:, None]) % width
        arguments = {
            "input_ids": ids.gather(1, index),
            "attention_mask": mask.gather(1, index).long(),
        }
        moved = {name: self.extra[name].gather(1, index) for name in BY_TOKEN if name in self.extra}
        return arguments | dict(self.extra) | moved, shift


# model inputs with one value for each token, and what stands at padding: they move with the tokens
BY_TOKEN = {"token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0, "labels": -100}


def make(
    inputs: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    limit: int | None,
    pad: int,
    image: int | None,
    vocab: int | None = None,
    predicts: bool = False,
) -> Batch:
    """Read prompts, ids, tensors or a mapping of model inputs into a Batch.

    limit: the model's context length. pad: id for padding. image: id of the image token, if there
    is one. vocab: number of token ids. predicts: whether what follows a text is asked. Raises
    InputError for an empty prompt, one longer than the context, an id outside the vocabulary, a
    mask with a hole, a cache, or text without a tokenizer.
    """
    extra: dict[str, Tensor] = {}
    mask = None
    notes: tuple[str, ...] = ()
    if isinstance(inputs, Mapping):
        mask, extra = beside.mask_rows(inputs.get("attention_mask")), beside.tensors(inputs)
        inputs = inputs.get("input_ids")
        if inputs is None and "inputs_embeds" not in extra:
            return Batch(None, None, extra)
        shape = beside.shape(extra["inputs_embeds"] if inputs is None else inputs)
        for name, fill in BY_TOKEN.items():
            # else labels of whole texts
            if name in extra and (name != "labels" or extra[name].shape == shape):
                extra[name] = right_padded(_rows(extra[name], None, mask), fill)
        if inputs is None:
            embeds, real = beside.embeddings(extra["inputs_embeds"], mask, limit)
            places = tuple(
                tuple(f"<{place}>" for place in range(n)) for n in real.sum(dim=1).tolist()
            )
            return Batch(None, real, extra | {"inputs_embeds": embeds}, places)
    rows = _rows(inputs, tokenizer, mask)
    if tokenizer is not None and (texts := beside.texts(inputs)):
        rows, notes = beside.as_meant(rows, texts, tokenizer, predicts)
    if not rows:
        raise InputError("inputs hold no prompt: give at least one.")
    for number, row in enumerate(rows):
        if not row:
            raise InputError(f"prompt {number} is empty: there is no token to explain.")
        if limit is not None and len(row) > limit:
            raise InputError(
                f"prompt {number} has {len(row)} tokens; this model's context is {limit}: shorten "
                "it."
            )
        wrong = [i for i in row if i < 0 or (vocab is not None and i >= vocab and i != image)]
        if wrong:
            raise InputError(
                f"prompt {number} has the token id {wrong[0]}; this model's ids run from 0 to "
                f"{vocab or '...'} - 1."
            )
    ids = right_padded(rows, pad)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    tokens = tuple(token_texts(tokenizer, row) for row in rows)
    images = None if image is None else (ids == image) & real
    return Batch(ids, real, extra, tokens, images, apart(tokenizer), notes)


def right_padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(example, position): the rows from position 0 on, `fill` after their end."""
    table = torch.full((len(rows), max(map(len, rows), default=0)), fill)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table


def _rows(inputs: Any, tokenizer: PreTrainedTokenizerBase | None, mask: Any) -> list[list[int]]:
    """Each example's own ids; what the mask hides is left out."""
    if mask is None:
        return rows_of(inputs, tokenizer)
    ids, keep = table(inputs), mask
    if [len(row) for row in ids] != [len(row) for row in keep]:
        raise InputError(
            "attention_mask and input_ids differ in shape: each token needs its own 0 or 1."
        )
    return [[i for i, real in zip(row, reals) if real] for row, reals in zip(ids, keep)]
