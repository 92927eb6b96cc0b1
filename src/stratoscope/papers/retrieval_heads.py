"""Retrieval Head Mechanistically Explains Long-Context Factuality.

Wu, Wang, Xiao, Peng and Fu, 2024. arXiv:2404.15574.
Claim: a few heads, there in every model, fetch what is asked from anywhere in the context; without
    them the model fails to retrieve, while what it knows by itself stays.
Methods: heads.retrieval_score, editing.drop_heads
Protocol: Llama-2-7B-80K, Yi, Qwen and Mistral of the paper: needles at ten depths in 1,000 to
    50,000 tokens, asked by a question; random heads of all layers masked as the null, 20 draws,
    and induction heads that are no retrieval heads.
What would change our mind: induction heads that are no retrieval heads, masked in the same number,
    spoil the needles as much; or random heads of all layers do.
What the authors may object: contexts of 300 tokens are not long, one animal is a short answer,
    and among 300 tokens it is the only animal, so that a model may find it without the place
    that is asked for; our models have 135 and 270 million parameters and 4-bit weights.

The paper decodes and counts over the set of a needle's words; `heads.retrieval_score` says how one
teacher-forced pass gives the same. Needles here (`lab.tasks.needle`) stand in prose of Python's
documentation and are asked for in other words: an earlier form repeated their first words to the
letter, which is what induction heads complete, and drew its null from the same layers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_heads
from stratoscope.editing.drop_heads import Head, strongest
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.metric import last_logits
from stratoscope.engine.pieces import before
from stratoscope.engine.sweep import sweep
from stratoscope.heads import retrieval_score, roles
from stratoscope.lab import data, planted
from stratoscope.lab.tasks import capitals, needle
from stratoscope.maths import resample
from stratoscope.models import LM
from stratoscope.results import label

LENGTH = 300  # tokens of haystack
RETRIEVES = 0.1  # the paper's line between retrieval heads and others
# needles to find the heads with, and to test them with; random sets of heads, and how many of
# these each needle is asked under
FOUND, TESTED, DRAWS, EACH = 20, 60, 20, 4
# share of all heads that is masked: as many as bring the paper's models below half (section 4.1)
MASKED = 0.05


@claim(
    says="Retrieval heads are those that copy what is asked from the context, token by token",
    where="section 2, equation 1 (retrieval score)",
    tier="identity",
    subject="planted.induction",
    expect="copier == 1 and recall == 1 and others < 0.25 and copier > 10 * uniform",
    null={"uniform": "uniform attention"},
)
def the_planted_copier_scores_one(seed: int) -> Measured:
    """A hand-built induction circuit: needles of five random words, hidden among others. Its
    copying head scores 1."""
    p = planted.induction(seed)
    lm = models.wrap(p.model, p.tokenizer)
    words, generator = sorted({*p.tokenizer.get_vocab()} - {"<pad>"}), np.random.default_rng(seed)
    needles = [" ".join(generator.permutation(words)[:5]) for _ in range(16)]
    found = retrieval_score.measure(lm, needles, length=12, seed=seed)
    score = found.score.mean("example").values.copy()
    copier, score[1, 2] = score[1, 2], 0
    return Measured(
        values={"copier": copier, "recall": found.recall.mean(), "others": score.max()},
        null={"uniform": found.null.mean()},
        n=len(needles),
    )


@claim(
    says="Only a small portion of the heads are retrieval heads",
    where="abstract (2), sparse; section 3.1, figure 3",
    read="full text",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="10 needles",
    valid="recall >= 0.5",
    expect="share > 0 and share < 0.10 and strongest_low > 10 * uniform",
    direction="share > 0 and share < 0.5 and strongest_low > uniform",
    null={"uniform": "uniform attention: the score of a head that reads everything alike"},
    thresholds="0.10: the ledger's (fewer than 5 % in the paper); 10 and 0.5 of the heads: ours;"
    " recall of 0.5: a model that finds less than half of the needles does not retrieve",
    found_there={"share": 0.05},
)
def retrieval_heads_are_few(lm: LM, seed: int) -> Measured:
    """Share of heads that score 0.1 or more over 20 needles at four depths of 300 tokens of prose,
    asked by a question. The paper's contexts have 1,000 to 50,000, and 3 to 6 % of its heads score
    so much. strongest: the score, on every second needle, of the head that is strongest on the
    others."""
    found = _scores(lm, seed)
    score = found.score.values
    mean = score.mean(axis=0)
    best = strongest(score[::2].mean(axis=0), 1 / mean.size)[0]
    retrieve = strongest(mean, max(1, (mean >= RETRIEVES).sum()) / mean.size)
    return Measured(
        values={"share": (mean >= RETRIEVES).mean(), "recall": found.recall.mean()},
        units={"strongest": score[1::2, *best]},
        null={"uniform": found.null.mean()},
        n=len(score[1::2]),
        figure=label(
            mean, ("layer", "head"), name="score", method="heads.retrieval_score", seed=seed
        ),
        note=f"Retrieval heads: {_said(retrieve)}.",
    )


@claim(
    says="Pruning retrieval heads makes retrieval fail; pruning random other heads "
    "does not; what the model knows by itself is little touched",
    where="abstract (5), causal; sections 4.1 and 4.3, figure 7",
    read="full text",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="60 needles",
    valid="recall >= 0.5 and facts >= 0.3",
    expect="masked_high <= 0.5 * recall and random_low >= 0.9 * recall and "
    "facts_masked_low >= 0.8 * facts and induction_only_masked_low > masked_high",
    direction="masked_high < random_low and masked_high < induction_only_masked_low and "
    "masked / recall < facts_masked / facts",
    null={
        "random": "as many heads that are not among them, drawn from all layers, layers 0 and 1 "
        "too: needles recalled, 20 draws of which each needle is asked under four",
        "induction_only_masked": "as many of the strongest induction heads that are not among them",
        "facts_random": "the same random heads, four of the draws: capitals known",
    },
    thresholds="0.5, 0.9 and 0.8: the ledger's; recall of 0.5 and facts of 0.3: a model that knows "
    "fewer has too little to lose",
)
def without_them_retrieval_fails(lm: LM, seed: int) -> Measured:
    """The 5 % of heads that score highest on some needles are put to zero on others: is the
    needle's animal still the model's next token? The facts are capitals, asked without any context.
    Intervals of needles are over needles, those of random heads too, each by its four draws. Long:
    five minutes and more a seed."""
    mean = _scores(lm, seed).score.mean("example").values
    # never heads that copied nothing: of equals the first layers' would be taken
    top = strongest(mean, min(MASKED, float((mean > 0).mean())))
    induction = roles.measure(lm, "The cat sat on the mat", seed=seed).score.sel(role="induction")
    rivals = strongest(induction.values, len(top) / mean.size, without=top)
    masked = [drop_heads.edit(lm, heads).interventions for heads in (top, rivals)]
    drawn = [
        drop_heads.edit(lm, top, null=DRAWS * seed + draw).interventions for draw in range(DRAWS)
    ]
    hidden = needle.needles(lm.tokenizer, FOUND + TESTED, seed)[FOUND:]
    prompts = [_prompt(lm, one, number) for number, one in enumerate(hidden)]
    answers = [lm.tokenizer(one.answer)["input_ids"][-1] for one in hidden]
    share = DRAWS // EACH
    some = [
        _among(changes, range(draw % share, TESTED, share)) for draw, changes in enumerate(drawn)
    ]
    whole, right = _right(lm, prompts, answers, [*masked, *some])
    under = np.stack(
        [right[2 + draw, draw % share :: share] for draw in range(DRAWS)]
    )  # (draw, needle)
    by_needle = under.reshape(EACH, share, -1).mean(axis=0).ravel()
    task = capitals.task(lm.tokenizer, 40, seed)
    asked = dict(zip(task.clean, task.answer_ids))  # each question once
    known, fact = _right(lm, list(asked), list(asked.values()), [masked[0], *drawn[:EACH]])
    low, high = resample.interval(by_needle, seed=seed)[1:3]
    only = resample.interval(right[1], seed=seed)
    return Measured(
        values={"recall": whole.mean(), "facts": known.mean()},
        units={"masked": right[0], "facts_masked": fact[0]},
        null={
            "random": under.mean(axis=1),
            "induction_only_masked": only.value,
            "facts_random": fact[1:].mean(axis=1),
        },
        interval={"random": (low, high), "induction_only_masked": (only.low, only.high)},
        n=TESTED,
        note=f"Masked: {_said(top)}. Induction heads that are not among them: {_said(rivals)}.",
    )


@cache
def _scores(lm: LM, seed: int) -> xr.Dataset:
    """Score and null (example, layer, head), and recall (example,), of the needles to find heads
    with."""
    found: list[xr.Dataset] = []
    for number, one in enumerate(needle.needles(lm.tokenizer, FOUND, seed)):
        asked = [_ids(lm, one.statement)]
        found.append(
            retrieval_score.measure(
                lm,
                [asked[0] + _ids(lm, one.answer)],
                haystack=[_prose(lm)],
                cue=len(asked[0]),
                question=[_ids(lm, one.question)],
                depth=_depth(number),
                length=LENGTH,
            )
        )
    each = ("score", "null", "recall")
    return xr.Dataset(
        {n: xr.concat([one[n].drop_vars("needle") for one in found], "example") for n in each}
    )


def _ids(lm: LM, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def _prose(lm: LM) -> tuple[int, ...]:
    """The first tokens of a page that nobody has trained on here."""
    page = max(data("python-docs").test[:20], key=len)
    return tuple(_ids(lm, page[:20_000])[:LENGTH])


def _depth(number: int) -> float:
    return (number % 4 + 0.5) / 4


def _prompt(lm: LM, one: needle.Needle, number: int) -> list[int]:
    start, hay = before(lm), _prose(lm)
    hidden, question = _ids(lm, one.statement) + _ids(lm, one.answer), _ids(lm, one.question)
    at = len(start) + round(_depth(number) * LENGTH)
    return retrieval_score.text([*start, *hay], hidden, question, at)


def _said(heads: Sequence[Head]) -> str:
    return ", ".join(f"L{a}H{b}" for a, b in heads)


def _among(changes: Sequence[Intervention], examples: Sequence[int]) -> list[Intervention]:
    """The changes, on some of the examples alone: the others are then not run anew."""
    return [replace(change, examples=list(examples)) for change in changes]


def _right(
    lm: LM, prompts: Sequence, answers: Sequence[int], cells: Sequence[Sequence[Intervention]]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each prompt's next token is the answer: of the model itself (prompt,), and with each
    cell (cell, prompt)."""
    wanted = torch.tensor(answers)

    def hit(logits: Tensor, example: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == wanted[example]).float()

    whole = hit(last_logits(lm, list(prompts)), torch.arange(len(wanted)))
    return whole.numpy(), sweep(lm, list(prompts), cells, hit).numpy()
