"""What runs: which prompts, at which step of generating, and where each row's own tokens stand in
the tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.errors import InputError
from stratoscope.models.batch import Batch


class Each(tuple[int, ...]):
    """One position for each example: as a single position does, it drops the axis."""


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a user's own call of the model stand: each row's first one and how many.

    mask: (row, position), True at real tokens. unknown: why this cannot be told, else "".
    """

    mask: Tensor
    unknown: str = ""

    @cached_property
    def lengths(self) -> Tensor:
        """On the host."""
        return self.mask.sum(dim=1).cpu()

    @property
    def start(self) -> Tensor:
        return self.mask.long().argmax(dim=1)

    def refuse_unknown(self) -> None:
        """Raises InputError where a row's tokens are not one piece, so that they cannot be
        numbered."""
        last = self.mask.shape[1] - self.mask.flip(1).long().argmax(dim=1)
        hole = not self.unknown and bool(
            (self.mask.any(dim=1) & (last - self.start != self.mask.sum(dim=1))).any()
        )
        if self.unknown or hole:
            reason = self.unknown or "an attention_mask that hides tokens between others"
            raise InputError(
                f"positions are named, and the model was called with {reason}: an example's own "
                "tokens cannot be "
                f"counted. Call it with one 0 or 1 for each token, or through `lm(...)`."
            )


@dataclass
class Run:
    """What is running: the batch (None when the user calls the Hugging Face model directly), how
    many forward passes came before this one since the model was last started, how far generation
    shifted each example to the right, how many positions the cache has seen, how many are new, how
    many rows each example has (beams), and whether the cache has a fixed number of places.
    """

    batch: Batch | None = None
    step: int = 0
    shift: Tensor | None = None
    past: int = 0
    new: int = 0
    copies: int = 1
    fixed: bool = False
    padding: Padding | None = None
    heard: Padding | None = None  # of what the encoder of an encoder-decoder reads

    @property
    def lengths(self) -> Tensor | None:
        """(row,) real tokens of each row's prompt, on the host; None where nobody knows."""
        if self.batch is not None:
            if self.batch.mask is None:
                return None
            return self.batch.host_lengths.repeat_interleave(self.copies)
        return None if self.padding is None else self.padding.lengths

    @property
    def mask(self) -> Tensor | None:
        """(row, position) True at real tokens; None where nobody knows."""
        mask = None if self.batch is None else self.batch.mask
        if mask is not None:
            return mask.repeat_interleave(self.copies, dim=0)
        return None if self.padding is None else self.padding.mask

    @property
    def start(self) -> Tensor | None:
        """(row,) where each row's own position 0 stands; None where all begin at 0."""
        if self.batch is not None or self.padding is None:
            return None if self.shift is None else self.shift.repeat_interleave(self.copies)
        return self.padding.start

    def gone(self, width: int) -> int:
        """How many of the oldest keys are not among `width` of them: a sliding window's cache has
        let them go."""
        return max(0, self.past + self.new - width) if self.step else 0

    def note(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], names: Mapping[str, str]
    ) -> None:
        """Read a forward pass's arguments; names: of the model, for what text models call ids and
        mask. One that finds an empty cache starts anew: step 0."""
        given = kwargs
        if args:
            given = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        given = {names.get(name, name): value for name, value in given.items()}
        # the cache's name until Transformers 5.24, still taken
        cache = given.get("cache", given.get("past_key_values"))
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.step = self.step + 1 if self.past else 0
        self.fixed = bool(getattr(cache, "is_compileable", False))
        two = "decoder_input_ids" in inspect.signature(module.forward).parameters
        tokens, mask = _tokens(given, "decoder_" if two else "")
        self.new = 0 if tokens is None else tokens.shape[1]
        if self.batch is None and self.step == 0:
            self.padding = None if tokens is None else _padding(tokens, mask)
            heard, mask = _tokens(given, "") if two else (None, None)
            self.heard = None if heard is None else _padding(heard, mask)


def _tokens(given: dict[str, Any], prefix: str) -> tuple[Tensor | None, Any]:
    """The ids or embeddings of a forward pass, (example, position, ...), and their mask."""
    tokens = given.get(f"{prefix}input_ids")
    tokens = given.get(f"{prefix}inputs_embeds") if tokens is None else tokens
    ids = tokens if isinstance(tokens, Tensor) and tokens.ndim > 1 else None
    return ids, given.get(f"{prefix}attention_mask")


def _padding(tokens: Tensor, mask: Any) -> Padding:
    everywhere = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask is None:
        return Padding(everywhere)
    if isinstance(mask, Tensor) and mask.shape == everywhere.shape:
        return Padding(mask.bool())
    if len(tokens) == 1:  # nothing to pad beside
        return Padding(everywhere)
    reason = (
        f"an attention_mask of shape {tuple(mask.shape)}"
        if isinstance(mask, Tensor)
        else "several masks"
    )
    return Padding(everywhere, reason)
