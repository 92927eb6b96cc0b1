"""Answers of several tokens, scored as wholes: the sum of their tokens' log probabilities.

    d = sum_k log p(a_k | prompt, a_1 .. a_k-1)  -  sum_k log p(f_k | prompt, f_1 .. f_k-1)

a is the answer's tokens, f the foil's, each given what stands before it (teacher forcing):

    tokens.occlusion.measure(lm, prompt, answer=Whole(" Saint-Denis"), foil=Whole(" Versailles"))

In a causal model nothing at the prompt depends on what follows it. So a change there is the same
on prompt + a_1 .. a_k-1 as on the prompt, and d is a sum of what is read at the ends of these
longer prompts. Where an answer's and a foil's token follow the same text, their difference is that
of their logits: for one token each, d is exactly the logit difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import metric, outside
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.metric import Target, Whole, Word, Words, last_logits, listed, tokens_of
from stratoscope.engine.select import position_index
from stratoscope.engine.sweep import Progress, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.taps import Run
from stratoscope.models.text import apart, joined, token_texts


def target(lm: LM, batch: Batch, answer: Words = None, foil: Words = None) -> Target:
    """`metric.target`, or answer and foil as wholes where one of them is `Whole`.

    Beside a whole answer a foil given as plain text is read whole too. Raises SiteError for a model
    that is no causal language model; InputError where only one of them is given, where they are the
    same, and for prompts with images.
    """
    if not any(isinstance(word, Whole) for x in (answer, foil) for word in _several(x)):
        return metric.target(lm, batch, answer, foil)
    _refuse_unfit(lm, batch)
    if answer is None or foil is None:
        missing = "answer" if answer is None else "foil"
        raise InputError(
            f"a whole text is compared with another one, and no {missing} is given: only single "
            f"tokens are chosen by themselves. Give {missing}=Whole('...')."
        )
    sides = [
        [_tokens(lm, word, what) for word in listed(words, len(batch), what)]
        for words, what in ((answer, "answer"), (foil, "foil"))
    ]
    pairs = tuple(zip(*sides))
    for length, pair in zip(batch.lengths.tolist(), pairs):
        _refuse_pair(lm, length, *pair)
    spaced = apart(lm.tokenizer)
    texts = [
        tuple(joined(token_texts(lm.tokenizer, ids), words=spaced) for ids in side)
        for side in sides
    ]
    counts = [", ".join(map(str, dict.fromkeys(map(len, side)))) for side in sides]
    note = (
        f"Answer and foil are scored as wholes, of {counts[0]} and {counts[1]} tokens: differences "
        f"are of sums of log probabilities."
    )
    first = [torch.tensor([ids[0] for ids in side]) for side in sides]
    return Target(*first, *texts, (*batch.notes, note), tokens=pairs)


def swept(
    lm: LM,
    batch: Batch,
    cells: Sequence[Intervention],
    asked: Target,
    *,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "cell example"]:
    """The difference under every cell, as `sweep` gives it: of one token, or of the whole texts.

    Positions are the prompt's, and so is -1; a cell that names none changes the whole prompt, and
    nothing of the answer. Raises what `sweep` raises.
    """
    if not asked.tokens:
        return sweep(lm, batch, cells, asked.difference, save=save, progress=progress)
    longer = continued(lm, batch, asked)
    with outside.unheard(lm):  # who listens outside hears of the prompts, not of rows made here
        base = capture(lm, batch, *dict.fromkeys(cell.site for cell in cells))
        known = {site: base[site] for site in base.sites if base.reached(site)}
        moved = [longer.moved(cell, known.get(cell.site)) for cell in cells]
        found = sweep(lm, longer.batch, moved, longer.metric, save=save, progress=progress)
    return longer.summed(found)


def unchanged(lm: LM, batch: Batch, asked: Target, logits: Tensor) -> Float[Tensor, " example"]:
    """The difference with nothing changed. logits: `last_logits` of the batch."""
    if not asked.tokens:
        return asked.difference(logits)
    longer = continued(lm, batch, asked)
    with outside.unheard(lm):
        logits = last_logits(lm, longer.batch)
    return longer.summed(longer.metric(logits, torch.arange(len(logits))))


def probabilities(
    lm: LM, batch: Batch, asked: Target, logits: Tensor
) -> Float[Tensor, "example 2"]:
    """Of answer and foil: of the first token, or of the whole text. logits: see `unchanged`."""
    if not asked.tokens:
        pair = torch.stack([asked.answer, asked.foil], dim=1).to(logits.device)
        return logits.float().softmax(dim=-1).gather(1, pair)
    longer = continued(lm, batch, asked)
    with outside.unheard(lm):
        each = last_logits(lm, longer.batch).float().log_softmax(dim=-1)
    chosen = each.gather(1, longer.following.to(each.device)) * longer.counts.to(each.device)
    return longer.summed(chosen.T).T.exp()


@dataclass(frozen=True)
class Continued:
    """Prompts with the beginnings of their answers and foils, none twice: one row each.

    example: (row,) whose prompt. following: (row, 2) the answer's and the foil's next token there;
    counts: (row, 2) 1.0 where there is one, else 0.0.
    """

    prompts: Batch
    batch: Batch
    example: Tensor
    following: Tensor
    counts: Tensor

    def metric(self, logits: Float[Tensor, "row vocab"], row: Tensor) -> Float[Tensor, " row"]:
        """log p(answer's next token) - log p(foil's next token), as far as there is one."""
        following, counts = (x[row.to(x.device)] for x in (self.following, self.counts))
        logits, counts = logits.float(), counts.to(logits.device)
        signed = logits.gather(1, following.to(logits.device)) * counts
        # where both follow the same text, what makes logits probabilities is the same and drops out
        return signed[:, 0] - signed[:, 1] - (counts[:, 0] - counts[:, 1]) * logits.logsumexp(dim=1)

    def summed(self, rows: Float[Tensor, "*cell row"]) -> Float[Tensor, "*cell example"]:
        """The sum of each example's rows; (row,) -> (example,) too."""
        found = rows.new_zeros(*rows.shape[:-1], len(self.prompts))
        return found.index_add(-1, self.example.to(rows.device), rows)

    def moved(self, cell: Intervention, base: Tensor | None) -> list[Intervention]:
        """A change of the prompts, made on every row of its examples, at the prompt's positions.

        base: the site's values in the prompts; a replacement by the very same is left out, as in
        `sweep`. [] when nothing is left. Raises SiteError for a site that has no position axis.
        """
        if cell.site.axes[:2] != ("example", "position") or cell.keys is not None:
            raise SiteError(
                f"`{cell.site}` cannot be changed under a whole answer: its axes are not (example, "
                f"position, ...), so the prompt's part is not known."
            )
        lengths = self.prompts.lengths.cpu()
        count, width = len(lengths), int(lengths.max())
        named = list(range(count)) if cell.examples is None else list(cell.examples)
        at = position_index(cell.positions, Run(self.prompts), count, width, named)
        real = at < lengths[:, None]  # padding would be the answer's tokens
        if base is not None and cell.operation == "replace":
            differs = (cell.apply(base, Run(self.prompts)) != base).flatten(2).any(dim=2).cpu()
            real = real & differs.gather(1, at.clamp(0, width - 1))
        # what is left out takes the place and the value of something that is not
        pick = torch.where(real, torch.arange(at.shape[1]), real.int().argmax(dim=1)[:, None])
        concerned = {example for example in named if real[example].any()}
        rows = [row for row, example in enumerate(self.example.tolist()) if example in concerned]
        if not rows:
            return []
        of = self.example[rows]
        value = cell.value
        if cell.operation in ("replace", "add", "scale"):
            value = value[(None,) * (len(cell.site.axes) - value.ndim)]
            if value.shape[0] > 1:
                value = value[[named.index(example) for example in of.tolist()]]
            if value.shape[1] > 1:
                value = value.expand(len(rows), *value.shape[1:])
                index = pick[of].to(value.device)
                value = value[torch.arange(len(rows), device=value.device)[:, None], index]
        at = at.gather(1, pick)[self.example]
        return [replace(cell, value=value, positions=at, examples=rows)]


def continued(lm: LM, batch: Batch, asked: Target) -> Continued:
    """Every text after which a token of an answer or a foil is asked, and those tokens.

    Raises InputError under an outer change that names positions or examples: it would act on other
    ones here.
    """
    for changes, _ in lm.taps.listening:
        for change in (getattr(e, "__self__", None) for site in changes for e in changes[site]):
            if isinstance(change, Intervention) and _names_places(change):
                raise InputError(
                    f"a change outside names positions, keys or examples at `{change.site}`, and a "
                    f"whole answer is scored on longer prompts and more of them. Ask for one token."
                )
    ids, mask = batch.text
    prompts = [row[real].tolist() for row, real in zip(ids, mask)]
    places: dict[tuple[int, tuple[int, ...]], list[int | None]] = {}
    for example, pair in enumerate(asked.tokens):
        for side, tokens in enumerate(pair):
            for k, token in enumerate(tokens):
                places.setdefault((example, tokens[:k]), [None, None])[side] = token
    following = torch.tensor([[token or 0 for token in pair] for pair in places.values()])
    there = [[float(token is not None) for token in pair] for pair in places.values()]
    rows = lm.batch([[*prompts[example], *before] for example, before in places])
    example = torch.tensor([example for example, _ in places])
    return Continued(batch, rows, example, following, torch.tensor(there))


def _several(words: Words) -> list[Word]:
    """What is given, without asking yet whether it fits the batch."""
    if words is None:
        return []
    return [words] if isinstance(words, (str, int, Whole)) else list(words)


def _tokens(lm: LM, word: Word, what: str) -> tuple[int, ...]:
    given = word.words if isinstance(word, Whole) else word
    if isinstance(given, str):
        return tuple(tokens_of(lm, given, what))
    ids = (given,) if isinstance(given, int) else tuple(map(int, given))
    if not ids or not all(0 <= token < lm.readout.size for token in ids):
        raise InputError(
            f"{what} {list(ids)}: give a text, or at least one token id, each below "
            f"{lm.readout.size}, the size of the vocabulary."
        )
    return ids


def _refuse_unfit(lm: LM, batch: Batch) -> None:
    if not lm.family.towers[""].causal or lm.readout.kind != "vocab":
        raise SiteError(
            f"a whole answer is scored token after token, each given those before it, and "
            f"{type(lm.model).__name__} ({lm.family.name}) is no causal language model. Ask for "
            "one "
            f"token or class."
        )
    if batch.ids is None or set(batch.extra) - set(lm.family.per_token):
        raise InputError(
            f"a whole answer is scored after prompts of text alone; these bring "
            f"{', '.join(batch.extra) or 'no tokens'} too. Give text or token ids, or ask for one "
            f"token."
        )


def _refuse_pair(lm: LM, length: int, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one == other:
        raise InputError(
            f"answer and foil are the same {len(one)} tokens "
            f"{list(token_texts(lm.tokenizer, one))}: "
            f"their difference is always zero. Give another foil."
        )
    longest = length + max(len(one), len(other)) - 1
    if lm.context is not None and longest > lm.context:
        raise InputError(
            f"a prompt of {length} tokens and all but the last of an answer or foil are {longest}; "
            f"this model's context is {lm.context}: shorten them."
        )


def _names_places(change: Intervention) -> bool:
    """Whether an outer change says where in the prompts, or which of them, it acts."""
    named = any(getattr(change, name) is not None for name in ("positions", "keys", "examples"))
    if named or change.operation not in ("replace", "add", "scale"):
        return named
    rest = len(change.site.axes) - 2  # after example and position
    return any(size > 1 for size in change.value.shape[: max(change.value.ndim - rest, 0)])
