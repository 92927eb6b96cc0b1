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
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import metric, outside
from stratoscope.engine.continued import continued
from stratoscope.engine.entry import ENTRY
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.metric import Target, Whole, Word, Words, last_logits, listed, tokens_of
from stratoscope.engine.sweep import Cell, Progress, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models import source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import apart, joined, token_texts


def target(
    lm: LM,
    batch: Batch,
    answer: Words = None,
    foil: Words = None,
    *,
    logits: Tensor | None = None,
) -> Target:
    """`metric.target`, or answer and foil as wholes where one of them is `Whole`.

    Beside a whole answer a foil given as plain text is read whole too. logits: `last_logits` of the
    batch, where they are known. Raises SiteError for a model
    that is no causal language model; InputError where only one of them is given, where they are the
    same, and for prompts with images.
    """
    if not any(isinstance(word, Whole) for x in (answer, foil) for word in _several(x)):
        return metric.target(lm, batch, answer, foil, logits=logits)
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
    cells: Sequence[Cell],
    target: Target,
    *,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "cell example"]:
    """The difference under every cell, as `sweep` gives it: of one token, or of the whole texts.

    Positions are the prompt's, and so is -1; a cell that names none changes the whole prompt, and
    nothing of the answer. Raises what `sweep` raises.
    """
    if not target.tokens:
        return sweep(lm, batch, cells, target.difference, save=save, progress=progress)
    longer = continued(lm, batch, target)
    parts = [[cell] if isinstance(cell, Intervention) else cell for cell in cells]
    sites = dict.fromkeys(change.site for cell in parts for change in cell)
    with outside.unheard(lm):  # who listens outside hears of the prompts, not of rows made here
        base = capture(lm, batch, *sites)
        known = {site: base[site] for site in base.sites if base.reached(site)}
        moved = [
            [on_rows for change in cell for on_rows in longer.moved(change, known.get(change.site))]
            for cell in parts
        ]
        values = sweep(lm, longer.batch, moved, longer.metric, save=save, progress=progress)
    return longer.summed(values)


def slope(
    lm: LM,
    batch: Batch,
    target: Target,
    *,
    start: Float[Tensor, "example position dim"] | None = None,
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example position dim"]]:
    """The difference, and its gradient at the prompts' entry to the stack (`engine.entry.ENTRY`).

    start: what enters there instead. Of whole texts, what the answer's own tokens enter as stays.
    """
    if not target.tokens:
        value, _, slopes = gradients(lm, batch, [ENTRY], target.difference, start=start)
        return value, slopes.popitem()[1]
    longer = continued(lm, batch, target)
    rows = torch.arange(len(longer.batch))
    entered = [] if start is None else longer.moved(replaced(ENTRY, start), None)
    with outside.unheard(lm):
        value, _, slopes = gradients(
            lm,
            longer.batch,
            [ENTRY],
            lambda logits: longer.metric(logits, rows),
            interventions=entered,
        )
    return longer.summed(value), longer.in_prompts(slopes.popitem()[1])


def unchanged(lm: LM, batch: Batch, target: Target, logits: Tensor) -> Float[Tensor, " example"]:
    """The difference with nothing changed. logits: `last_logits` of the batch."""
    if not target.tokens:
        return target.difference(logits)
    longer = continued(lm, batch, target)
    with outside.unheard(lm):
        logits = last_logits(lm, longer.batch)
    return longer.summed(longer.metric(logits, torch.arange(len(logits))))


def probabilities(
    lm: LM, batch: Batch, target: Target, logits: Tensor
) -> Float[Tensor, "example 2"]:
    """Of answer and foil: of the first token, or of the whole text. logits: see `unchanged`."""
    if not target.tokens:
        pair = torch.stack([target.answer, target.foil], dim=1).to(logits.device)
        return logits.float().softmax(dim=-1).gather(1, pair)
    longer = continued(lm, batch, target)
    with outside.unheard(lm):
        each = last_logits(lm, longer.batch).float().log_softmax(dim=-1)
    chosen = each.gather(1, longer.following.to(each.device)) * longer.counts.to(each.device)
    return longer.summed(chosen.T).T.exp()


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
    source.refuse(lm, "a whole answer is not scored yet on its targets. Ask for one token")
    if not lm.family.towers[""].causal or lm.readout.kind != "vocab":
        raise SiteError(
            f"a whole answer is scored token after token, each given those before it, and "
            f"{type(lm.model).__name__} ({lm.family.name}) is no causal language model. Ask for "
            f"one token or class."
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
