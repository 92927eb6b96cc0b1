"""One set of heads, four papers: what is lost with the induction heads.

Ours, 2026.
Claim: whether the few heads that attend to what followed a word before are what three papers on
    lists and long contexts measure, so that without them all three kinds of recall are lost, while
    what a model knows without a context stays.
Methods: heads.roles, editing.drop_heads, heads.retrieval_score, tokens.verbatim_recall
Across: retrieval-heads, verbatim-memory, talking-heads, factual-recall-pipeline
Protocol: the models of the four papers (Llama-2-7B-80K and its like, GPT-2, Pythia) on their own
    needles, lists and facts: induction heads from random words said twice, put to zero, beside 20
    draws of as many heads of the same layers. `stratoscope claim one-set-of-heads --model
    YOUR/MODEL` runs the small one.
What would change our mind: a model whose heads with an induction role of half or more can all be
    put to zero while needles are still found, or lists still repeated; or random heads of the same
    layers that cost as much; or capitals lost in the same share as lists.
What the authors may object: a head at zero is not a head taken out, for others may make up for it
    or be thrown off; needles of 150 tokens and one animal are no long context, lists of three
    or four things no hard ones; where half of a layer's heads are induction heads, as in
    Qwen2.5-Coder-0.5B, random heads of that layer are the other half each time.

kept is the share of what the model does that it still does without these heads, unit by unit.
Each paper finds its heads by its own task. Here they are found by none of these: by attention on
random words said twice (`heads.roles`, induction of 0.5 or more, the bar that this atlas uses for
talking-heads), on texts that no task is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_heads
from stratoscope.editing.drop_heads import Head
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervention import Intervention
from stratoscope.engine.metric import last_logits
from stratoscope.engine.sweep import sweep
from stratoscope.heads import retrieval_score, roles
from stratoscope.lab import data, planted
from stratoscope.lab.tasks import capitals, laundry_list, needle
from stratoscope.maths.resample import interval
from stratoscope.models import LM
from stratoscope.papers import _read_twice
from stratoscope.results import label
from stratoscope.tokens import verbatim_recall

ATTENDS, RETRIEVES = 0.5, 0.1  # induction role and retrieval score from which a head counts
DRAWS, EACH = 20, 5  # random sets of heads, and under how many of them a long text is asked
# needles whose heads are scored and that are asked; lists of nouns, laundry lists, questions
SCORED, NEEDLES, LISTS, LEFT, FACTS = 20, 40, 20, 60, 60
DEPTHS, LETTERS, TOKENS = (0.125, 0.375, 0.625, 0.875), 700, 150  # where, in how long a text


@claim(
    says="Heads are found by attention on random words said twice, and without them a list is not "
    "repeated",
    where="what this page rests on",
    tier="identity",
    subject="planted.induction",
    expect="found == 1 and lost > 10 * others and lost > 0.5",
    null={"others": "what is lost without another head of the same layer, the most of all"},
)
def the_planted_head_is_found_and_missed(seed: int) -> Measured:
    """A hand-built induction circuit of eight heads: its copying head alone has the role, and
    without it the recall of eight words is lost. lost: recall with less recall without."""
    p = planted.induction(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words = [word for word in p.tokenizer.get_vocab() if word.isalpha()][:8]
    heads = _heads(lm, seed, prompt=p.clean).heads
    others = [(layer, head) for layer, _ in heads for head in range(lm.dims.heads)]

    def recall(without: Sequence[Head] = ()) -> float:
        with drop_heads.edit(lm, without) if without else nullcontext():
            found = verbatim_recall.measure(lm, " ".join(words), opening=words[-1], seed=seed)
        return 1 - found.repeat.item()

    whole = recall()
    missed = [whole - recall([head]) for head in others if head not in heads]
    return Measured(
        values={
            "found": heads == [head for head in sorted(p.heads) if head[0] == 1],
            "lost": whole - recall(heads),
        },
        null={"others": max(missed)},
        n=len(words),
    )


@claim(
    says="The heads that complete random words said twice are retrieval heads",
    where="retrieval-heads: section 2 and figure 3 (score, and its line at 0.1)",
    read="full text",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="20 needles",
    valid="attends >= 0.5 and recall >= 0.5",
    expect="score_low >= 0.1 and score_low > random_bound",
    direction="score_low > random_bound",
    null={"random": "as many other heads of the same layers, 20 draws: their mean score"},
    thresholds="0.1: the paper's line between retrieval heads and others; 0.5 of attention: that of"
    " talking-heads here; recall of 0.5: retrieval-heads'",
)
def they_fetch_the_needle(lm: LM, seed: int) -> Measured:
    """Mean retrieval score of the induction heads on 20 needles at four depths of 150 tokens of
    prose, asked for by a question. retrieve: the share of them that score 0.1 or more; among: the
    share of all heads scoring so much that are among them."""
    return _fetched(lm, seed, to_the_letter=False)


@claim(
    says="The heads that complete random words said twice fetch a needle that is asked for by its "
    "own first words",
    where="retrieval-heads: an earlier form of ours, which no paper has",
    read="full text",
    tier="small",
    side=True,
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="20 needles",
    valid="attends >= 0.5 and recall >= 0.5",
    expect="score_low >= 0.1 and score_low > random_bound",
    direction="score_low > random_bound",
    null={"random": "as many other heads of the same layers, 20 draws: their mean score"},
    thresholds="0.1: the paper's line between retrieval heads and others; 0.5 of attention: that of"
    " talking-heads here; recall of 0.5: retrieval-heads'",
)
def they_fetch_what_is_asked_to_the_letter(lm: LM, seed: int) -> Measured:
    """The same needles, asked for by repeating the sentence up to the animal: what stands before
    the answer stood before it in the needle, which is what an induction head looks for."""
    return _fetched(lm, seed, to_the_letter=True)


@claim(
    says="Without these heads a needle in the context is not found",
    where="retrieval-heads: abstract (5), section 4.1, figure 7",
    read="full text",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="40 needles",
    valid="attends >= 0.5 and whole >= 0.5",
    expect="kept_high <= 0.5 and without_high < random_floor and extra_low > 0",
    direction="without < random_floor and extra_low > 0",
    null={"random": "as many other heads of the same layers, 20 draws: needles found"},
    thresholds="half of what the model finds, and 0.5 that it must find: retrieval-heads'; 0.5 of "
    "attention: that of talking-heads here",
)
def without_them_the_needle_is_lost(lm: LM, seed: int) -> Measured:
    """Is the needle's animal the next token? 40 needles at four depths of 150 tokens of prose,
    asked for in other words. extra: what is lost beyond what random heads of the same layers lose,
    needle by needle; each needle is asked under five of the draws."""
    chosen, page = _heads(lm, seed), _page()
    made = [
        needle.task(lm.tokenizer, NEEDLES // 4, 4 * seed + n, haystack=page, depth=depth)
        for n, depth in enumerate(DEPTHS)
    ]
    prompts = [prompt for one in made for prompt in one.clean]
    answers = [answer for one in made for answer in one.answer_ids]
    return _told(chosen, _on_tasks(lm, chosen, (prompts, answers), seed, each=EACH))


@claim(
    says="Without these heads a list is read again as if it had never been read",
    where="verbatim-memory: abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="20 lists",
    valid="attends >= 0.5 and whole_low >= 0.6",
    expect="kept_high <= 0.5 and without_high < random_floor and extra_low > 0",
    direction="without < random_floor and extra_low > 0",
    null={"random": "as many other heads of the same layers, 20 draws: recall"},
    thresholds="0.6: verbatim-memory's repeat surprisal of 0.4 or less; half: ours, as for needles;"
    " 0.5 of attention: that of talking-heads here",
)
def without_them_a_list_is_new(lm: LM, seed: int) -> Measured:
    """Lists of ten nouns read twice. Recall is 1 less the median surprisal of the second reading
    over that of the same nouns read first (each list's first token left out), all under the same
    heads: 1 recalls all, 0 nothing."""
    chosen, texts = _heads(lm, seed), _read_twice.lists(LISTS, seed)
    whole, under = _read_twice.recall(lm, texts, seed), np.full((DRAWS, LISTS), np.nan)
    with drop_heads.edit(lm, chosen.heads):
        without = _read_twice.recall(lm, texts, seed)
    for draw, edit in enumerate(chosen.drawn(lm, seed)):
        some = _some(draw, LISTS, EACH)
        with edit:
            under[draw, some] = _read_twice.recall(lm, [texts[number] for number in some], seed)
    return _told(chosen, Kept(whole, without, under))


@claim(
    says="Without these heads the thing left over on a list is not told",
    where="talking-heads: abstract (Laundry List)",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="60 lists",
    valid="attends >= 0.5 and whole >= 0.5",
    expect="kept_high <= 0.5 and without_high < random_floor and extra_low > 0",
    direction="without < random_floor and extra_low > 0",
    null={"random": "as many other heads of the same layers, 20 draws: lists answered"},
    thresholds="half, and 0.5 that the model must answer: ours, as for needles; 0.5 of attention: "
    "that of talking-heads here",
)
def without_them_nothing_is_left_over(lm: LM, seed: int) -> Measured:
    """Three or four things are packed and all but one taken out: is that one the next token? Who
    names any of the things is right in 0.29 of the lists."""
    chosen = _heads(lm, seed)
    return _told(chosen, _on_tasks(lm, chosen, _left_over(lm, seed), seed))


@claim(
    says="What the model knows without a context stays: capitals are named when these heads are "
    "gone and lists are not told",
    where="retrieval-heads: section 4.3; factual-recall-pipeline: abstract (capitals as its facts)",
    read="full text",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="18 capitals",
    valid="attends >= 0.5 and whole >= 0.3 and lists >= 0.5",
    expect="kept_low >= 0.8 and kept_low > lists_kept_high",
    direction="kept_low > lists_kept_high",
    null={
        "lists_kept": "the share of lists kept without the same heads: that these do something "
        "can be seen there",
        "random": "as many other heads of the same layers, 20 draws: capitals named",
    },
    thresholds="0.8 and 0.3: retrieval-heads'; 0.5 of lists: ours; 0.5 of attention: that of "
    "talking-heads here",
)
def what_is_known_stays(lm: LM, seed: int) -> Measured:
    """Each capital is asked for once, without any context; lists as in the claim on what is left
    over."""
    chosen = _heads(lm, seed)
    made = capitals.task(lm.tokenizer, FACTS, seed)
    rows = sorted(made.answers.index(capital) for capital in {*made.answers})
    asked = [made.clean[row] for row in rows], [made.answer_ids[row] for row in rows]
    kept = _on_tasks(lm, chosen, asked, seed)
    cells = [drop_heads.edit(lm, chosen.heads).interventions]
    lists, [left] = _right(lm, *_left_over(lm, seed), cells)
    share = interval(left, lists, seed=seed)
    return _told(
        chosen,
        kept,
        values={"lists": lists.mean()},
        null={"lists_kept": share.value},
        around={"lists_kept": (share.low, share.high)},
    )


def _fetched(lm: LM, seed: int, *, to_the_letter: bool) -> Measured:
    """Retrieval scores of the induction heads, and of random heads of the same layers."""
    chosen, page = _heads(lm, seed), lm.tokenizer(_page(), add_special_tokens=False)["input_ids"]
    hidden = needle.needles(lm.tokenizer, SCORED, seed)
    found = []
    for number, depth in enumerate(DEPTHS):
        some = hidden[number :: len(DEPTHS)]
        statement, answer, question = (
            lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*some)
        )
        found.append(
            retrieval_score.measure(
                lm,
                [cue + word for cue, word in zip(statement, answer)],
                haystack=[page],
                cue=[len(cue) for cue in statement],
                question=None if to_the_letter else question,
                depth=depth,
                length=TOKENS,
            )
        )
    score, recall = (
        np.concatenate([one[name].values for one in found]) for name in ("score", "recall")
    )
    mean, rows = score.mean(axis=0), tuple(np.array(chosen.heads).T)
    retrieve = mean >= RETRIEVES
    return Measured(
        values=chosen.told
        | {
            "recall": recall.mean(),
            "retrieve": retrieve[rows].mean(),
            "among": retrieve[rows].sum() / max(1, retrieve.sum()),
        },
        units={"score": score[:, *rows].mean(axis=1)},
        null={
            "random": [
                mean[tuple(np.array(_named(edit)).T)].mean() for edit in chosen.drawn(lm, seed)
            ]
        },
        n=len(score),
        figure=label(
            mean, ("layer", "head"), name="score", method="heads.retrieval_score", seed=seed
        ),
        note=chosen.said,
    )


class Chosen(NamedTuple):
    """The induction heads of a model, and the least that one of them attends."""

    heads: list[Head]
    attends: float

    def drawn(self, lm: LM, seed: int) -> list[Edit]:
        """As many others of the same layers put to zero, DRAWS times."""
        return [
            drop_heads.edit(lm, self.heads, null=DRAWS * seed + draw, same_layers=True)
            for draw in range(DRAWS)
        ]

    @property
    def told(self) -> dict[str, float]:
        return {"heads": len(self.heads), "attends": self.attends}

    @property
    def said(self) -> str:
        return f"Induction heads: {', '.join(f'L{layer}H{head}' for layer, head in self.heads)}."


class Kept(NamedTuple):
    """What is right of the model as it is and without the heads: (unit,); and with random heads
    gone: (draw, unit), NaN where a unit was not asked."""

    whole: np.ndarray
    without: np.ndarray
    under: np.ndarray


def _heads(lm: LM, seed: int, prompt: str = "The cat sat on the mat") -> Chosen:
    """The heads whose induction role is at least ATTENDS; the strongest one where there is none."""
    score = roles.measure(lm, prompt, seed=seed).score.sel(role="induction").values
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(score >= ATTENDS)]
    heads = heads or drop_heads.strongest(score, 1 / score.size)
    return Chosen(heads, min(float(score[head]) for head in heads))


def _named(edit: Edit) -> list[Head]:
    """The heads that an edit drops."""
    return [(int(c.site.layer or 0), int(u)) for c in edit.interventions for u in c.units or ()]


def _page() -> str:
    """The beginning of a page of Python's documentation, in which needles are hidden."""
    return max(data("python-docs").test[:20], key=len)[:LETTERS]


def _left_over(lm: LM, seed: int) -> tuple[list[Any], list[int]]:
    """Lists of three or four things, and the one that is left over."""
    made = laundry_list.task(lm.tokenizer, LEFT, seed)
    return list(made.clean), list(made.answer_ids)


def _some(draw: int, count: int, each: int) -> range:
    """The units that are asked under a draw: every unit under `each` of the draws."""
    return range(draw % (DRAWS // each), count, DRAWS // each)


def _on_tasks(
    lm: LM,
    chosen: Chosen,
    asked: tuple[Sequence, Sequence[int]],
    seed: int,
    *,
    each: int = DRAWS,
) -> Kept:
    """Whether the answer is the next token. asked: prompts and answers; each: as for `_some`."""
    prompts, answers = asked
    some = [_some(draw, len(prompts), each) for draw in range(DRAWS)]
    cells = [drop_heads.edit(lm, chosen.heads).interventions]
    cells += [
        [replace(change, examples=list(own)) for change in edit.interventions]
        for own, edit in zip(some, chosen.drawn(lm, seed))
    ]
    whole, right = _right(lm, prompts, answers, cells)
    under = np.full((DRAWS, len(prompts)), np.nan)
    for draw, (own, row) in enumerate(zip(some, right[1:])):
        under[draw, own] = row[own]
    return Kept(whole, right[0], under)


def _right(
    lm: LM, prompts: Sequence, answers: Sequence[int], cells: Sequence[Sequence[Intervention]]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each prompt's next token is the answer: of the model itself (prompt,), and with each
    cell (cell, prompt)."""
    wanted = torch.tensor(answers)

    def hit(logits: Tensor, example: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == wanted.to(logits.device)[example]).float()

    whole = hit(last_logits(lm, list(prompts)), torch.arange(len(wanted)))
    return whole.cpu().numpy(), sweep(lm, list(prompts), cells, hit).cpu().numpy()


def _told(
    chosen: Chosen,
    kept: Kept,
    values: Mapping[str, float] = MappingProxyType({}),
    null: Mapping[str, float] = MappingProxyType({}),
    around: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Measured:
    """The share that is kept, and what is lost beyond the loss with random heads gone, unit by
    unit. values, null, around: numbers beside these."""
    whole, without, under = kept
    share = interval(without, whole)
    return Measured(
        values={**chosen.told, "kept": share.value, **values},
        units={
            "whole": whole,
            "without": without,
            "extra": np.nanmean(under, axis=0) - without,
        },
        null={"random": np.nanmean(under, axis=1), **null},
        interval={"kept": (share.low, share.high), **around},
        n=len(whole),
        note=chosen.said,
    )
