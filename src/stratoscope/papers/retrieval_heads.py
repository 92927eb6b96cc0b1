"""Retrieval Head Mechanistically Explains Long-Context Factuality.

Wu, Wang, Xiao, Peng and Fu, 2024. arXiv:2404.15574.
Claim: a few heads, there in every model, fetch what is asked from anywhere in the context; without
    them the model fails to retrieve, while what it knows by itself stays.
Methods: heads.retrieval_score
Protocol: Llama-2-7B-80K, Yi, Qwen and Mistral of the paper: needles at ten depths in 1,000 to
    50,000 tokens, asked by a question; random heads of all layers masked as the null, 20 draws,
    and induction heads that are no retrieval heads.

The paper decodes and counts over the set of a needle's words; `heads.retrieval_score` says how one
teacher-forced pass gives the same. Needles here are three words of a place, in prose of Python's
documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.engine.intervene import Intervention, ablate
from stratoscope.engine.metric import last_logits
from stratoscope.engine.sweep import sweep
from stratoscope.heads import retrieval_score
from stratoscope.lab import data, planted
from stratoscope.lab.tasks import capitals
from stratoscope.models import LM
from stratoscope.results import label

PLACES = "castle lighthouse garden library hospital station museum theatre bridge harbor".split()
WORDS = """tiger marble violin pepper copper garlic falcon velvet candle ladder rocket walnut dragon
anchor button hammer carpet pillow magnet""".split()
LENGTH = 300  # tokens of haystack
RETRIEVES = 0.1  # the paper's line between retrieval heads and others
# needles to find the heads with, needles and random sets to test them with
FOUND, TESTED, DRAWS = 10, 16, 4
# share of all heads that is masked: as many as bring the paper's models below half (section 4.1)
MASKED = 0.05

Head = tuple[int, int]
Needle = tuple[list[int], int]  # ids, and how many of them are the cue


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
    expect="share > 0 and share < 0.10 and strongest > 10 * uniform",
    direction="share > 0 and share < 0.5",
    null={"uniform": "uniform attention: the score of a head that reads everything alike"},
    thresholds="0.10: the ledger's (fewer than 5 % in the paper); 10 and 0.5: ours",
    found_there={"share": 0.05},
)
def retrieval_heads_are_few(lm: LM, seed: int) -> Measured:
    """Share of heads that score 0.1 or more over needles at four depths of 300 tokens of prose. The
    paper's contexts have 1,000 to 50,000, and 3 to 6 % of its heads score so much. The ledger asks
    for fewer than 10 %. `always` is the share that scores on every needle."""
    score, uniform, recall = _scores(lm, seed)
    mean = score.mean(axis=0)
    return Measured(
        values={
            "share": (mean >= RETRIEVES).mean(),
            "strongest": mean.max(),
            "always": (score > 0).all(axis=0).mean(),
            "recall": recall,
        },
        null={"uniform": uniform},
        n=len(score),
        figure=label(
            mean, ("layer", "head"), name="score", method="heads.retrieval_score", seed=seed
        ),
        note="Retrieval heads: "
        f"{', '.join(f'L{a}H{b}' for a, b in _top(mean, int((mean >= RETRIEVES).sum())))}.",
    )


@claim(
    says="Pruning retrieval heads makes retrieval fail; pruning random other heads "
    "does not; what the model knows by itself is little touched",
    where="abstract (5), causal; sections 4.1 and 4.3, figure 7",
    read="full text",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="16 needles",
    expect="masked <= 0.5 * recall and random >= 0.9 * recall and facts_masked >= 0.8 * facts",
    direction="masked < random and masked / recall < facts_masked / facts",
    null={
        "random": "as many heads of the same layers that are no retrieval heads: needles "
        "recalled, four draws",
        "facts_random": "the same: capitals known",
    },
    thresholds="0.5, 0.9 and 0.8: the ledger's",
)
def without_them_retrieval_fails(lm: LM, seed: int) -> Measured:
    """The 5 % of heads that score highest on some needles are put to zero on others: is the
    needle's first word still the model's next token? The facts are capitals, asked without any
    context. Random heads are taken from the same layers, so that a difference is not one of depth;
    the paper draws them from all."""
    mean = _scores(lm, seed)[0].mean(axis=0)
    generator = np.random.default_rng(seed)
    top = _top(mean, round(MASKED * mean.size))
    cells = [
        _masked(heads) for heads in (top, *(_others(mean, top, generator) for _ in range(DRAWS)))
    ]
    needles = _needles(lm, TESTED, seed + 1_000)
    prompts = [_prompt(lm, needle, number) for number, needle in enumerate(needles)]
    needle = _right(lm, prompts, [ids[cue] for ids, cue in needles], cells)
    task = capitals.task(lm.tokenizer, 40, seed)
    fact = _right(lm, task.clean, task.answer_ids, cells)
    return Measured(
        values={
            "recall": needle[0],
            "masked": needle[1],
            "facts": fact[0],
            "facts_masked": fact[1],
        },
        null={"random": needle[2:], "facts_random": fact[2:]},
        n=TESTED,
        figure=label(
            np.stack([needle[2:], fact[2:]], axis=1),
            ("draw", "role"),
            name="recall",
            method="heads.retrieval_score",
            seed=seed,
            coords={"role": ["needles", "capitals"]},
        ),
        note=f"Masked: {', '.join(f'L{a}H{b}' for a, b in top)}.",
    )


@cache
def _scores(lm: LM, seed: int) -> tuple[np.ndarray, float, float]:
    """Score (needle, layer, head), uniform attention's mean score, and mean recall."""
    found = [
        retrieval_score.measure(
            lm, [ids], haystack=[_prose(lm)], cue=cue, depth=_depth(number), length=LENGTH
        )
        for number, (ids, cue) in enumerate(_needles(lm, FOUND, seed))
    ]
    score = np.concatenate([one.score.values for one in found])
    return (
        score,
        float(np.mean([one.null for one in found])),
        float(np.mean([one.recall for one in found])),
    )


def _needles(lm: LM, n: int, seed: int) -> list[Needle]:
    generator, found = np.random.default_rng(seed), []
    for _ in range(n):
        cue = f"\nThe three secret words of the {generator.choice(PLACES)} are"
        words = generator.choice(WORDS, 3, replace=False)
        found.append(
            [lm.tokenizer(text)["input_ids"] for text in (f"{cue} {' '.join(words)}", cue)]
        )
    return [(ids, len(cue)) for ids, cue in found]


@cache
def _prose(lm: LM) -> tuple[int, ...]:
    """The first tokens of a page that nobody has trained on here."""
    page = max(data("python-docs").test[:20], key=len)
    return tuple(lm.tokenizer(page[:20_000])["input_ids"][:LENGTH])


def _depth(number: int) -> float:
    return (number % 4 + 0.5) / 4


def _prompt(lm: LM, needle: Needle, number: int) -> list[int]:
    return retrieval_score.text(_prose(lm), *needle, round(_depth(number) * LENGTH))


def _top(score: np.ndarray, n: int) -> list[Head]:
    order = np.argsort(-score.ravel(), kind="stable")[:n]
    return [divmod(int(number), score.shape[1]) for number in order]


def _others(score: np.ndarray, top: Sequence[Head], generator: np.random.Generator) -> list[Head]:
    """As many heads of each layer that score below the line; a layer that has too few gives what it
    has."""
    found: list[Head] = []
    for layer in sorted({layer for layer, _ in top}):
        free = [h for h in np.flatnonzero(score[layer] < RETRIEVES) if (layer, int(h)) not in top]
        wanted = sum(other == layer for other, _ in top)
        found += [(layer, int(head)) for head in generator.permutation(free)[:wanted]]
    return found


def _masked(heads: Sequence[Head]) -> list[Intervention]:
    layers = sorted({layer for layer, _ in heads})
    return [
        ablate(f"layers.{n}.attn.z", units=[head for layer, head in heads if layer == n])
        for n in layers
    ]


def _right(
    lm: LM, prompts: Sequence, answers: Sequence[int], cells: Sequence[list[Intervention]]
) -> np.ndarray:
    """Share of prompts whose next token is the answer: of the model itself, then with each cell."""
    wanted = torch.tensor(answers)

    def hit(logits: Tensor, example: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == wanted[example]).float()

    whole = hit(last_logits(lm, list(prompts)), torch.arange(len(wanted)))
    return torch.cat([whole[None], sweep(lm, list(prompts), cells, hit)]).mean(dim=1).numpy()
