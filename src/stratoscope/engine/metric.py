"""What a prediction is asked: the logit of an answer minus the logit of a foil, at one position of each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.kinds import Rival, rival
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

Word = str | int
Words = Word | Sequence[Word] | None


@dataclass(frozen=True)
class Target:
    """Answer and foil of every example: ids (example,) and texts; `notes` says what was assumed.

    rivals: how each foil was chosen, where none was given.
    """

    answer: Tensor
    foil: Tensor
    answer_text: tuple[str, ...]
    foil_text: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()

    @property
    def coords(self) -> dict[str, tuple[tuple[str, ...], list[str]]]:
        """Coordinates for a labelled result."""
        return {
            "answer": (("example",), list(self.answer_text)),
            "foil": (("example",), list(self.foil_text)),
        }

    def difference(
        self, logits: Float[Tensor, "example vocab"], example: Tensor | None = None
    ) -> Float[Tensor, " example"]:
        """logit(answer) - logit(foil) of each row; `example` says which example a row is of (default: in order)."""
        answer, foil = (x if example is None else x[example.to(x.device)] for x in (self.answer, self.foil))
        pair = torch.stack([answer, foil], dim=1).to(logits.device)
        chosen = logits.gather(1, pair)
        return chosen[:, 0] - chosen[:, 1]


@torch.no_grad()
def last_logits(lm: LM, inputs: Any) -> Float[Tensor, "example vocab"]:
    """Logits of the next token after each example's last real one."""
    from stratoscope.engine import outside
    from stratoscope.engine.trace import capture

    lm.layout.resolve("logits")
    batch = lm.batch(inputs)
    if batch.ids is None:
        raise InputError("these inputs hold no tokens, so there is no next token to ask about: give a prompt.")
    if outside.reads_out_anew(lm):
        return outside.own_logits(lm, batch, batch.lengths - 1)
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    return lm.readout(capture(lm, batch, last, positions=-1)[last])


def target(lm: LM, inputs: Any, answer: Words = None, foil: Words = None) -> Target:
    """Read answer and foil (one for all examples, or one each).

    Defaults: the answer is the most probable token (other than the foil), the foil a likely token
    of the answer's kind (`kinds.rival`; `rivals` keeps its reasons). A text of several tokens stands
    for its first, and a note says so. Raises InputError when answer and foil are the same token, or a
    list does not fit the batch.
    """
    batch = lm.batch(inputs)
    n = len(batch)
    notes = list(batch.notes)
    answers, foils = (_ids(lm, words, n, what, notes) for words, what in ((answer, "answer"), (foil, "foil")))
    rivals: list[Rival] = []
    if answers is None or foils is None:
        logits = last_logits(lm, batch)
        if answers is None:
            top = logits.topk(2, dim=-1).indices.cpu()
            clash = top[:, 0] == foils if foils is not None else torch.zeros(n, dtype=torch.bool)
            answers = torch.where(clash, top[:, 1], top[:, 0])
        if foils is None:
            rivals = [rival(lm, row, best) for row, best in zip(logits, answers.tolist())]
            foils = torch.tensor([found.token for found in rivals])
    same = (answers == foils).nonzero()
    if len(same):
        text = token_text(lm.tokenizer, int(answers[same[0]]))
        raise InputError(
            f"answer and foil are the same token {text!r}: their difference is always zero. Give another foil."
        )
    texts = [tuple(token_text(lm.tokenizer, int(i)) for i in ids) for ids in (answers, foils)]
    return Target(answers, foils, *texts, tuple(dict.fromkeys(notes)), tuple(rivals))


def _ids(lm: LM, words: Words, n: int, what: str, notes: list[str]) -> Tensor | None:
    if words is None:
        return None
    listed = [words] * n if isinstance(words, (str, int)) else list(words)
    if len(listed) != n:
        raise InputError(f"{len(listed)} {what}s for {n} examples: give one, or one for each.")
    return torch.tensor([_id(lm, word, what, notes) for word in listed])


def _id(lm: LM, word: Word, what: str, notes: list[str]) -> int:
    if isinstance(word, int):
        if not 0 <= word < lm.dims.vocab:
            raise InputError(f"{what} id {word} is outside the vocabulary of {lm.dims.vocab} tokens.")
        return word
    if lm.tokenizer is None:
        raise InputError(f"{what} {word!r}: this model was wrapped without a tokenizer; give a token id.")
    ids = lm.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{what} {word!r} has no token.")
    if len(ids) > 1:
        first = token_text(lm.tokenizer, ids[0])
        notes.append(f"The {what} {word!r} is {len(ids)} tokens; its first, {first!r}, is used.")
    return int(ids[0])
