"""Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference.

Xiao, Wang, Li, Deng, Tang, Li, Zhang, Wang and Chen, 2025. arXiv:2502.13542.
Claim: a probe query made of the tokens that stand out of a window retrieves the past keys that
    matter better than the window's mean or last token does, and room shared out by entropy among
    the layers is better used.
Methods: tokens.kv_retrieval
Protocol: Llama 3 8B and Qwen2.5 7B on LongBench and InfiniteBench, 2,000 keys of up to 100,000, the
    answers' quality against InfLLM and others.
    `stratoscope claim actqkv --model YOUR/MODEL` runs the small one.
What would change our mind: a model that answers with the whole cache, and whose needle is among the
    keys that the activation probe retrieves no oftener than among those of the mean or the last
    token.
What the authors may object: our texts have 1,536 tokens and our budget 192 keys; we count keys
    found and not answers; a window is 64 tokens; a block's representative is its mean key, theirs
    are some of its keys; the last window holds the end of the text beside the question.

The abstract and a reader's note were read; the code is anonymous and was not seen. Which heads vote
is not said there: here all heads of a layer retrieve the same blocks.

Who else would pass: recency (`window`), any blocks (`random`), words in common (`bm25`: the needle
and the question share the name of the place, so that it is high here), and every query for itself
(`best_query`), which costs as many products as the window has tokens. What a probe reads to decide
is not free: one representative a block, 1,400 / 32 of them, is read beside the 192 keys.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import transformers as hf
import xarray as xr

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.lab import data
from stratoscope.lab.tasks import needle as task
from stratoscope.models import LM
from stratoscope.tokens import kv_retrieval

NEEDLES, LENGTH, BUDGET, BLOCK, DRAWS, ABLE = 72, 1536, 192, 32, 20, 24
DEPTHS = (0.2, 0.5, 0.8)
SIZES = {"block": 3, "local": 4, "first": 2}


@claim(
    says="With a budget of the whole text the model is itself, on either side of padding; with "
    "less it is plain Transformers on the keys that are read, rotated to where they stood",
    where="what a retrieved key is",
    tier="identity",
    subject="a random Llama of one layer",
    expect="worst <= 0.00001 and half_budget > 0.001 and wrong > 0.001",
    null={"wrong": "the same keys, rotated to the positions that they have among themselves"},
)
def the_keys_are_the_same(seed: int) -> Measured:
    """Logits of 31 and 24 random tokens; keys that are read: those whose attention is not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
        lm = models.wrap(
            hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, **sizes, **heads)).eval()
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (31, 24)]
    plain = [last_logits(lm, [row])[0] for row in rows]
    worst = []
    for left in (False, True):
        with kv_retrieval.edit(lm, 31, **SIZES):
            whole = last_logits(lm, _padded(rows, left))
        worst += [float((one - two).abs().max()) for one, two in zip(whole, plain)]
    with kv_retrieval.edit(lm, 14, **SIZES):
        half = last_logits(lm, [rows[0]])[0]
        pattern = capture(lm, [rows[0]], "layers.0.attn.pattern", positions=-1)
    kept = (pattern["layers.0.attn.pattern"][0].sum(dim=0) > 0).nonzero()[:, 0]
    ids = torch.tensor([rows[0]])[:, kept]
    with torch.no_grad():
        own = lm.model(ids, position_ids=kept[None]).logits[0, -1]
        anew = lm.model(ids).logits[0, -1]
    worst.append(float((half - own).abs().max()))
    return Measured(
        values={"worst": max(worst), "half_budget": float((half - plain[0]).abs().max())},
        null={"wrong": float((half - anew).abs().max())},
        n=len(rows),
    )


@claim(
    says="The activation probe retrieves the keys that are needed oftener than the mean or the "
    "last query of the window, and than recency; room by entropy is no worse than the same for all "
    "layers",
    where="abstract (probe query, dynamic cut-off); the reader's note for the formulas",
    read="abstract",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="72 needles",
    valid="full_answer_low > chance",
    expect="over_mean_low >= 0.05 and over_last_low >= 0.05 and over_window_low >= 0.3 and "
    "layered >= act and act > random_bound",
    direction="over_mean > 0 and over_window > 0",
    we_add="it is no worse than the best of all queries, which costs a window's worth of products",
    we_expect="act >= best_query - 0.02",
    null={
        "mean": "recall by the window's mean query",
        "last": "by its last query",
        "window": "by the nearest blocks",
        "best_query": "by the best score of all its queries",
        "random": "by random blocks",
        "bm25": "by words that a block and the question have in common",
        "chance": "answers that name one of the animals",
    },
    thresholds="0.05 and 0.3: the specification's, the least that would matter; 0.02: ours, a "
    "fifth of a block in ten",
)
def the_probe_finds_the_needle(lm: LM, seed: int) -> Measured:
    """An animal of some place in 1,536 tokens of Wikipedia, after a fifth, a half or four fifths of
    it, is asked for at the end. act: the share of the needle's keys among the 192 that are read,
    mean over layers, by needle; attended: by the blocks that the window attends to most, which no
    probe can pass. full_answer: whether the model names the animal with all keys, in 24 texts."""
    made = [_text(lm, seed, number) for number in range(NEEDLES)]
    parts = [kv_retrieval.measure(lm, [one.ids], budget=BUDGET, block=BLOCK, needle=[one.span],
                                  draws=DRAWS, seed=seed + number)
             for number, one in enumerate(made)]  # fmt: skip
    recall = {
        str(name): np.array([float(p.recall.sel(probe=name).mean()) for p in parts])
        for name in parts[0].probe.values
    }
    act = recall["activation"]
    right = [last_logits(lm, [one.ids])[0].argmax().item() == one.answer for one in made[:ABLE]]
    drawn = np.mean([p.null_recall.mean(["example", "layer"]).values for p in parts], axis=0)
    return Measured(
        values={"attended": recall["attended"].mean()},
        units={
            "act": act,
            "layered": recall["layered"],
            "over_mean": act - recall["mean"],
            "over_last": act - recall["last"],
            "over_window": act - recall["recent"],
            "full_answer": np.array(right, dtype=float),
        },
        null={
            "mean": recall["mean"].mean(),
            "last": recall["last"].mean(),
            "window": recall["recent"].mean(),
            "best_query": recall["max"].mean(),
            "random": drawn,
            "bm25": np.mean([_bm25(one) for one in made]),
            "chance": 1 / len(task.ANIMALS),
        },
        n=NEEDLES,
        figure=_figure(parts),
    )


class Text(NamedTuple):
    """ids of the whole text, where the needle stands in them and where the question begins, and the
    id of the answer."""

    ids: list[int]
    span: tuple[int, int]
    question: int
    answer: int


def _text(lm: LM, seed: int, number: int) -> Text:
    """Filler from another page for each, so long that needle, filler and question fill the text."""
    tokenizer = lm.tokenizer
    one = task.needles(tokenizer, NEEDLES, seed)[number]
    read = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    hidden, asked, answer = (
        read(text) for text in (f"{one.statement}{one.answer}.\n", one.question, one.answer)
    )
    pages = [page for page in data("enwik8").test if len(page) > 20_000]
    filler = read(pages[(NEEDLES * seed + number) % len(pages)][2000:14_000])
    filler = filler[: LENGTH - len(hidden) - len(asked)]
    at = int(DEPTHS[number % len(DEPTHS)] * len(filler))
    ids = [*filler[:at], *hidden, *filler[at:], *asked]
    return Text(ids, (at, at + len(hidden)), len(ids) - len(asked), answer[0])


def _bm25(one: Text) -> float:
    """The share of the needle's tokens in the blocks that share the rarest tokens with the question
    (Robertson's weights, k1 = 1.2, b does not matter: blocks are alike in length)."""
    first, local = 8, 64
    edge = (len(one.ids) - 1) // local * local - local
    starts = range(first, edge, BLOCK)
    counts = [Counter(one.ids[start : min(start + BLOCK, edge)]) for start in starts]
    scores = np.zeros(len(counts))
    for token in {*one.ids[one.question :]}:
        held = np.array([count[token] for count in counts])
        rare = math.log(1 + (len(counts) - (held > 0).sum() + 0.5) / ((held > 0).sum() + 0.5))
        scores += rare * held * 2.2 / (held + 1.2)
    best = np.argsort(-scores, kind="stable")[: (BUDGET - first - local) // BLOCK]
    read = {at for b in best for at in range(starts[b], min(starts[b] + BLOCK, edge))}
    return len(read & {*range(*one.span)}) / len(range(*one.span))


def _padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def _figure(parts: list[xr.Dataset]) -> xr.DataArray:
    """Recall by layer, of each probe."""
    each = [part["recall"].mean("example") for part in parts]
    return each[0].copy(data=np.mean([part.values for part in each], axis=0))
