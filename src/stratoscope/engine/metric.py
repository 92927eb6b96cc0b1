"""What a prediction is asked: the logit of an answer minus the logit of a foil, at one position of
each example."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.kinds import Rival, rival, unembedding
from stratoscope.errors import InputError
from stratoscope.models import finite
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

if TYPE_CHECKING:
    from stratoscope.engine.trace import Trace


@dataclass(frozen=True)
class Whole:
    """An answer or a foil counted with all of its tokens: its text, or its token ids."""

    words: str | Sequence[int]


Word = str | int | Whole
Words = Word | Sequence[Word] | None


@dataclass(frozen=True)
class Target:
    """Answer and foil of every example: ids (example,) and texts; `notes` says what was assumed.

    rivals: how each foil was chosen, where none was given. tokens: of each example all tokens of
    its answer and all of its foil, where they are scored as wholes (`engine.sequence`); answer and
    foil are then the first ones.
    """

    answer: Tensor
    foil: Tensor
    answer_text: tuple[str, ...]
    foil_text: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    tokens: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def runs(self) -> float:
        """Prompts that are run for each given one: of whole texts, one for every token, less
        one."""
        whole = [len(answer) + len(foil) - 1 for answer, foil in self.tokens]
        return sum(whole) / len(whole) if whole else 1.0

    def of(self, examples: Sequence[int]) -> Target:
        """The questions of these examples, in this order; one may come several times."""

        def some(x: tuple) -> tuple:
            return tuple(x[e] for e in examples) if x else x

        return replace(
            self,
            answer=self.answer[list(examples)],
            foil=self.foil[list(examples)],
            answer_text=some(self.answer_text),
            foil_text=some(self.foil_text),
            rivals=some(self.rivals),
            tokens=some(self.tokens),
        )

    @property
    def words(self) -> dict[str, Any]:
        """`answer` and `foil` as another method takes them: token ids, or whole texts."""
        if self.tokens:
            sides = ([Whole(pair[side]) for pair in self.tokens] for side in (0, 1))
        else:
            sides = (self.answer.tolist(), self.foil.tolist())
        return dict(zip(("answer", "foil"), sides))

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
        """logit(answer) - logit(foil) of each row; `example` says which example a row is of
        (default: in order)."""
        answer, foil = (
            x if example is None else x[example.to(x.device)] for x in (self.answer, self.foil)
        )
        pair = torch.stack([answer, foil], dim=1).to(logits.device)
        chosen = logits.gather(1, pair)
        return chosen[:, 0] - chosen[:, 1]


def last_logits(lm: LM, inputs: Any) -> Float[Tensor, "example output"]:
    """Logits of the next token after each example's last real one; of a classifier those of its
    classes."""
    return logits_with(lm, inputs)[0]


@torch.no_grad()
def logits_with(
    lm: LM, inputs: Any, *sites: str
) -> tuple[Float[Tensor, "example output"], Trace | None]:
    """`last_logits`, and a trace of the sites (outside the attention kernel) from the same pass."""
    from stratoscope.engine import outside
    from stratoscope.engine.trace import capture, trace

    batch = lm.batch(inputs)
    if batch.mask is None and lm.readout.kind == "vocab":
        raise InputError(
            "these inputs hold no tokens, so there is no next token to ask about: give a prompt."
        )
    if outside.reads_out_anew(lm):
        with trace(lm, *sites, stop=False) if sites else nullcontext() as seen:
            logits = outside.answers(lm, batch)
        finite.refuse({"the model's logits": logits})
        return logits, seen
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    # one position is kept, not all: the last layer's stream of many prompts is large
    where = lm.readout.place(batch) if lm.readout.single and not sites else None
    seen = capture(lm, batch, *sites, last, positions=where)
    logits = lm.readout.of(seen[last], batch) if where is None else lm.readout(seen[last])
    finite.refuse({"the model's logits": logits})
    return logits, seen


def word(lm: LM, number: int) -> str:
    """An output as a person reads it: a token's text, or the name of a class."""
    names = lm.readout.names
    return names[number] if names else token_text(lm.tokenizer, number)


def target(
    lm: LM,
    inputs: Any,
    answer: Words = None,
    foil: Words = None,
    *,
    single: str = "",
    logits: Tensor | None = None,
) -> Target:
    """Read answer and foil (one for all examples, or one each).

    Defaults: the answer is the most probable token (other than the foil), the foil a likely token
    of the answer's kind (`kinds.rival`; `rivals` keeps its reasons). A classifier's are its
    classes, by name or number. A text of several tokens stands for its first, and a note says so.
    single: why one token alone can be asked here, said to whoever gives a `Whole`. logits:
    `last_logits` of the inputs, where they are known. Raises InputError for a `Whole`, when answer
    and foil are the same, a list does not fit the batch, or the model has one output only.
    """
    batch = lm.batch(inputs)
    if lm.readout.kind == "values":
        raise InputError(
            "this model gives one value, so there is no answer and no foil: ask for `last_logits`, "
            "or give a sweep a "
            "metric of your own."
        )
    n = len(batch)
    notes = list(batch.notes)
    answers, foils = (
        _ids(lm, words, n, what, notes, single)
        for words, what in ((answer, "answer"), (foil, "foil"))
    )
    rivals: list[Rival] = []
    if answers is None or foils is None:
        logits = last_logits(lm, batch) if logits is None else logits
        if answers is None:
            top = logits.topk(2, dim=-1).indices.cpu()
            clash = top[:, 0] == foils if foils is not None else torch.zeros(n, dtype=torch.bool)
            answers = torch.where(clash, top[:, 1], top[:, 0])
        if foils is None:
            speaks = lm.tokenizer is not None and not lm.readout.names
            unembed = unembedding(lm) if speaks else None
            rivals = [rival(lm, row, best, unembed) for row, best in zip(logits, answers.tolist())]
            foils = torch.tensor([others.token for others in rivals])
    same = (answers == foils).nonzero()
    if len(same):
        text, kind = word(lm, int(answers[same[0]])), "class" if lm.readout.names else "token"
        raise InputError(
            f"answer and foil are the same {kind} {text!r}: their difference is always zero. Give "
            "another foil."
        )
    texts = [tuple(word(lm, int(i)) for i in ids) for ids in (answers, foils)]
    return Target(answers, foils, *texts, tuple(dict.fromkeys(notes)), tuple(rivals))


def listed(words: Word | Sequence[Word], n: int, what: str) -> list[Word]:
    """One word for each of n examples. Raises InputError when there are not as many."""
    given = [words] * n if isinstance(words, (str, int, Whole)) else list(words)
    if len(given) != n:
        raise InputError(f"{len(given)} {what}s for {n} examples: give one, or one for each.")
    return given


def _ids(lm: LM, words: Words, n: int, what: str, notes: list[str], single: str) -> Tensor | None:
    if words is None:
        return None
    return torch.tensor([_id(lm, word, what, notes, single) for word in listed(words, n, what)])


def _id(lm: LM, word: Word, what: str, notes: list[str], single: str) -> int:
    readout = lm.readout
    if isinstance(word, Whole):
        raise InputError(
            f"{what} {word.words!r} cannot be asked whole: "
            f"{single or 'this measure asks about one next token'}. The attributions of tokens, "
            f"the activation patching of layers and heads and circuits score whole texts; for one "
            f"token, give it without Whole (--whole)."
        )
    if isinstance(word, int):
        if not 0 <= word < readout.size:
            among = "vocabulary" if readout.kind == "vocab" else "read-out"
            limits = (
                "tokens"
                if readout.kind == "vocab"
                else f"outputs ({', '.join(readout.names):.200})"
            )
            raise InputError(f"{what} id {word} is outside the {among} of {readout.size} {limits}.")
        return word
    if readout.names:
        if word not in readout.names:
            raise InputError(
                f"{what} {word!r} is no class of this model; it has "
                f"{', '.join(readout.names):.400}."
            )
        return readout.names.index(word)
    ids = tokens_of(lm, word, what)
    if len(ids) > 1:
        first = token_text(lm.tokenizer, ids[0])
        notes.append(
            f"The {what} {word!r} is {len(ids)} tokens; its first, {first!r}, is used (--whole, in "
            "Python metric.Whole, scores all tokens of answer and foil)."
        )
    return ids[0]


def tokens_of(lm: LM, text: str, what: str) -> list[int]:
    """The token ids of a text alone, without special ones. Raises InputError where it has none."""
    if lm.tokenizer is None:
        raise InputError(
            f"{what} {text!r}: this model was wrapped without a tokenizer; give a token id."
        )
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"{what} {text!r} has no token.")
    return list(map(int, ids))
