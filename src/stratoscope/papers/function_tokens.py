"""Memory Retrieval and Consolidation in Large Language Models through Function Tokens.

Zhang, Lin and Li, 2025. arXiv:2510.08203.
Claim: function tokens activate the most predictive features of the context, and training is
    dominated by predicting the content tokens that follow them; function tokens themselves are
    learned first.
Methods: tokens.transition_loss
Protocol: a 1.5B model trained on SlimPajama with all its checkpoints, function tokens counted on
    the same corpus (122 that cover 40 %); loss by transition at each checkpoint, of all tokens and
    among word beginnings; for the other half a sparse autoencoder of a middle layer.
What would change our mind: a model in which content words are as easy after a function token as
    after a content token, once pieces inside words are left out; function tokens learned no sooner
    than other tokens that together occur as often.
What the authors may object: they count all tokens, in 1.5B and 8B models and in a vocabulary of
    128,000, where fewer words are in pieces; ours are small, and Wikipedia is not their corpus. The
    first half of the paper, on which its title rests, is not tested.

Half of the paper: this is the loss. The other half (ten tokens activate most features) needs a
sparse autoencoder and waits for one.

Function tokens are the paper's: the most frequent ones that cover 40 % of a corpus (section 2.2:
122 of LLaMA-3.1's, on SlimPajama). Here they are counted on other text, Wikipedia prose, by each
model's own tokenizer. The paper adds tokens "until" 40 % are covered; whether the last one counts
is left open, and here it does. "Dominated" the paper shows by the mean loss of a prediction (Figure
9; its 1.5B model ends at 4.88 nats for function->content, 3.69 content->content, 2.12
function->function, 1.90 content->function) and prints no share of the whole loss. Here both are
asked for, and that it matters which token stands before (the null): that rare tokens are harder is
true of any model, also of a unigram one.
The paper takes word pieces as tokens like any other; a piece inside a word follows a content token
and is easy, so that tokenisation alone would make the ratio. Here only predictions that begin a
word count, in what is measured and in its null; all_ratio and all_share are of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.lab import data, make
from stratoscope.lab.miniatures import _text
from stratoscope.maths import resample
from stratoscope.models import LM
from stratoscope.tokens import transition_loss
from stratoscope.tokens.transition_loss import TRANSITIONS

CC, FC = TRANSITIONS.index("content->content"), TRANSITIONS.index("function->content")
TEXTS, LENGTH, DRAWS = 48, 128, 200
COUNTED = 4_000_000  # characters of enwik8 on which tokens are counted
# nats a prediction of its 1.5B model at the end, in the order of TRANSITIONS
PAPER = 3.69, 1.90, 4.88, 2.12


@claim(
    says="Predictions fall into four groups, by whether this token and the next are "
    "function or content tokens",
    where="section 4.3",
    tier="identity",
    subject="a bigram language that a Llama knows exactly",
    expect="abs(share - 0.75) < 0.0001 and predictions == 0.5 and abs(loss - "
    "function_loss * 3) < 0.0001 and share > dealt",
    null={
        "dealt": "95th percentile of the share when the labels of the tokens before are "
        "dealt out anew to token types"
    },
)
def a_language_of_two_kinds(seed: int) -> Measured:
    """Eight content words may follow a function word (ln 8 nats), two function words a content word
    (ln 2): shares 3 to 1."""
    chances = torch.zeros(10, 10)
    chances[:2, 2:], chances[2:, :2] = 1 / 8, 1 / 2
    generator = torch.Generator().manual_seed(seed)
    rows = [[0] for _ in range(8)]
    for row in rows:
        while len(row) < 41:
            row.append(int(torch.multinomial(chances[row[-1]], 1, generator=generator)))
    found = transition_loss.measure(
        models.wrap(bigram_model(chances)), rows, function=[0, 1], draws=DRAWS, seed=seed
    )
    return Measured(
        values={
            "share": found.loss_share[FC],
            "predictions": found.prediction_share[FC],
            "loss": found.loss[FC],
            "function_loss": found.loss.sel(transition="content->function"),
        },
        null={"dealt": found.null_loss_share[:, FC].quantile(0.95)},
        n=len(rows),
    )


@claim(
    says="The training loss is dominated by predicting the content tokens that follow "
    "function tokens",
    where="abstract; section 4.3, Figure 9",
    read="full text",
    tier="small",
    subject="tiny-gpt",
    kind="miniature",
    n="48 texts",
    expect="share_lead_low > 0 and loss_lead_low > 0 and ratio_low > dealt_bound",
    direction="share > predictions and ratio_low > dealt_bound",
    null={
        "dealt": "the ratio among word beginnings when the labels of the tokens before are dealt "
        "out anew to token types that together occur as often, while what is predicted keeps its "
        "label; 200 draws"
    },
    thresholds="0: no other transition is ahead of it, in its share of the loss and in nats a"
    " prediction",
)
def content_after_function_throughout_training(seed: int) -> Measured:
    """Every checkpoint of tiny-gpt after the untrained one, on 48 windows of held-out Wikipedia
    prose, among predictions that begin a word.

    share_lead and loss_lead: how far function->content is ahead of the next largest group, in its
    share of all loss and in nats a prediction, at the checkpoint where that is least; ratio is its
    loss over content->content's at the last one. An earlier form counted pieces inside words: 1.23
    on seed 0, and 0.98 among word beginnings.
    """
    return _dominance(_tiny_gpt(seed), seed)


@claim(
    says="The training loss is dominated by predicting the content tokens that follow "
    "function tokens",
    where="abstract; section 4.3, Figure 9",
    read="full text",
    tier="small",
    subjects=("smollm2", "qwen2.5-coder-0.5b"),
    n="48 texts",
    expect="share_lead_low > 0 and loss_lead_low > 0 and ratio_low > dealt_bound",
    direction="share > predictions and ratio_low > dealt_bound",
    null={
        "dealt": "the ratio among word beginnings when the labels of the tokens before are dealt "
        "out anew to token types that together occur as often, while what is predicted keeps its "
        "label; 200 draws"
    },
    thresholds="0: no other transition is ahead of it, in its share of the loss and in nats a"
    " prediction",
)
def content_after_function_at_the_end(lm: LM, seed: int) -> Measured:
    """A finished model, on 48 windows of held-out Wikipedia prose: how its loss is divided, after
    training, among predictions that begin a word.

    share_lead and loss_lead are how far function->content is ahead of the next largest group, in
    its share of all loss and in nats a prediction; ratio is its loss over content->content's.
    """
    return _dominance(_seen({"trained": lm}, seed), seed)


@claim(
    says="Function tokens are learned faster, and their loss ends lower",
    where="section 4.3, Figure 9",
    read="full text",
    tier="small",
    subject="tiny-gpt",
    kind="miniature",
    n="48 texts",
    expect="lead_low > dealt_bound and function_high < content_low",
    direction="lead_low > 0 and function < content",
    null={
        "dealt": "lead when the labels of the tokens predicted are dealt out anew to token types "
        "that together occur as often; 200 draws"
    },
    thresholds="0: neither kind is ahead",
)
def function_tokens_are_learned_first(seed: int) -> Measured:
    """How much of its whole fall from the untrained to the last checkpoint a kind's loss has behind
    it, on the way there, among predictions that begin a word.

    lead is the mean over the checkpoints between of function's part less content's, and over texts;
    function and content are the losses at the end, in nats. That what is frequent is learned first
    is no wonder; the claim is the paper's.
    """
    seen = _tiny_gpt(seed)
    loss, kind = _losses(seen), _kinds(seen.last)
    after, generator = seen.rows[:, 1:], torch.Generator().manual_seed(seed)
    word, counts = kind >= 0, torch.bincount(after[torch.from_numpy(kind >= 0)])
    function = kind % 2 == 1  # of the token predicted
    occurrences = int(function[word].sum())
    most = int(after.max()) + 1
    counts = torch.nn.functional.pad(counts, (0, most - len(counts)))
    anew = (transition_loss.dealt(counts, occurrences, generator)[after] for _ in range(DRAWS))
    end = {name: _sums(loss[-1:], which)[0] for name, which in _both(function, word).items()}
    often = {name: which.sum(axis=1) for name, which in _both(function, word).items()}
    found = {name: resample.interval(end[name], often[name], seed=seed) for name in end}
    return Measured(
        values={name: each.value for name, each in found.items()},
        null={"dealt": [np.nanmean(learned(loss, kinds.numpy(), word)) for kinds in anew]},
        n=len(seen.rows),
        units={"lead": learned(loss, function, word)},
        interval={name: (each.low, each.high) for name, each in found.items()},
        figure=xr.DataArray(
            np.array([one.loss.values for one in seen.found.values()]).T,
            {"transition": list(TRANSITIONS), "step": list(seen.found)},
            ["transition", "step"],
            name="nats a prediction",
        ),
    )


def learned(loss: np.ndarray, function: np.ndarray, word: np.ndarray) -> np.ndarray:
    """(text,): part of their whole fall that the function tokens' losses (step, text, prediction)
    have behind them, less that of the content tokens': the mean over the steps between the first
    and the last. function, word: (text, prediction), what is a function token and what begins a
    word. NaN where a text lacks one of the kinds."""
    parts = []
    for which in _both(function, word).values():
        with np.errstate(invalid="ignore", divide="ignore"):
            curve = _sums(loss, which) / which.sum(axis=1)
            parts.append((curve[:1] - curve[1:-1]) / (curve[:1] - curve[-1:]))
    return (parts[0] - parts[1]).mean(axis=0)


def _both(function: np.ndarray, word: np.ndarray) -> dict[str, np.ndarray]:
    return {"function": function & word, "content": ~function & word}


class Seen(NamedTuple):
    """Windows of text (text, position), ids of the function tokens, and what was measured at each
    step of training."""

    lm: LM
    rows: Tensor
    function: list[int]
    found: dict[Any, xr.Dataset]

    @property
    def last(self) -> xr.Dataset:
        return list(self.found.values())[-1]


def _tiny_gpt(seed: int) -> Seen:
    folders = sorted(make("tiny-gpt", seed=seed).glob("checkpoints/step-*"), key=_step)
    return _seen({_step(folder): folder for folder in folders}, seed)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _seen(steps: Mapping[Any, LM | Path], seed: int) -> Seen:
    """The same windows measured at each step; the tokenizer must be the same for all."""
    opened = ((step, lm if isinstance(lm, LM) else models.load(lm)) for step, lm in steps.items())
    found: dict[Any, xr.Dataset] = {}
    for step, lm in opened:
        if not found:
            first, function, rows = lm, _function(lm), _windows(lm, seed)
        found[step] = transition_loss.measure(
            lm, rows, function=function, words=True, draws=DRAWS, seed=seed
        )
    return Seen(first, rows, function, found)


def _function(lm: LM) -> list[int]:
    """Function tokens by the model's own tokenizer, on the beginning of enwik8's training part."""
    texts = list(_text.prose("".join(data("enwik8").train)[:COUNTED]))
    ids = [i for row in lm.tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row]
    return transition_loss.function_tokens(
        torch.bincount(torch.tensor(ids), minlength=lm.dims.vocab)
    ).tolist()


def _windows(lm: LM, seed: int) -> Tensor:
    """(text, position): a stretch from a random place of each of some articles of enwik8's test
    part."""
    generator = np.random.default_rng(seed)
    articles = list(_text.prose("".join(data("enwik8").test)))
    rows = []
    for i in generator.permutation(len(articles)):
        ids = lm.tokenizer(articles[i], add_special_tokens=False)["input_ids"]
        if len(ids) >= LENGTH and len(rows) < TEXTS:
            at = int(generator.integers(len(ids) - LENGTH + 1))
            rows.append(ids[at : at + LENGTH])
    return torch.tensor(rows)


def _dominance(seen: Seen, seed: int) -> Measured:
    """Judged at every step but an untrained one; intervals are 95 % over texts."""
    last, kind = seen.last, _kinds(seen.last)
    loss = _losses(seen)[[step != 0 for step in seen.found]]
    count = np.stack([(kind == k).sum(axis=1) for k in range(len(TRANSITIONS))])
    total = np.stack([_sums(loss, kind == k) for k in range(len(TRANSITIONS))], axis=1)
    every = transition_loss.kinds(*_function_before_and_after(seen)).numpy()
    alone = transition_loss.by_transition(
        torch.from_numpy(loss[-1].ravel()), torch.from_numpy(every.ravel())
    )
    leads = [_leads(one, count, seed) for one in total]
    share, nats = (min(found, key=lambda each: each.value) for found in zip(*leads))
    ratio = resample.interval(
        _without_counts(total[-1, FC], count[FC]),
        _without_counts(total[-1, CC], count[CC]),
        seed=seed,
    )
    found = {"share_lead": share, "loss_lead": nats, "ratio": ratio}
    named = " ".join(repr(seen.lm.tokenizer.decode([i])) for i in seen.function[:12])
    each = [
        f"{name} {last.loss_share[k]:.3f}, {last.prediction_share[k]:.3f}, {last.loss[k]:.2f}, "
        f"{alone['loss'][k]:.2f}, {PAPER[k]:.2f}"
        for k, name in enumerate(TRANSITIONS)
    ]
    return Measured(
        values={name: each.value for name, each in found.items()}
        | {
            "share": last.loss_share[FC],
            "predictions": last.prediction_share[FC],
            "all_share": alone["loss_share"][FC],
            "all_ratio": alone["loss"][FC] / alone["loss"][CC],
        },
        null={"dealt": (last.null_loss[:, FC] / last.null_loss[:, CC]).values},
        n=len(kind),
        interval={name: (each.low, each.high) for name, each in found.items()},
        figure=xr.DataArray(
            [last.prediction_share.values, last.loss_share.values],
            {"of": ["predictions", "loss"], "transition": list(TRANSITIONS)},
            ["of", "transition"],
            name="share",
        ),
        note=f"{len(seen.function)} function tokens: {named} ... Where a word begins: share of the "
        "loss, share of the predictions, nats a prediction; then nats of all tokens, and the "
        f"paper's: {'; '.join(each)}.",
    )


def _leads(
    total: np.ndarray, count: np.ndarray, seed: int
) -> tuple[resample.Interval, resample.Interval]:
    """How far function->content is ahead of the next largest group: in its share of all loss and in
    nats a prediction, from sums over the predictions of each text (transition, text)."""
    others = [k for k in range(len(TRANSITIONS)) if k != FC]
    most = max(others, key=lambda k: total[k].sum())
    share = resample.interval(total[FC] - total[most], total.sum(axis=0), seed=seed)
    worst = max(others, key=lambda k: total[k].sum() / max(count[k].sum(), 1))
    each = (_without_counts(total[k], count[k]) for k in (FC, worst))
    return share, resample.interval(next(each) - next(each), seed=seed)


def _without_counts(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(text,): values whose mean is sum(total) / sum(count), each off it by as much as that text
    moves this mean, so that an interval of their mean or ratio counts the counts' chance in."""
    mean = total.sum() / count.sum()
    return mean + (total - mean * count) / count.mean()


def _function_before_and_after(seen: Seen) -> tuple[Tensor, Tensor]:
    """(text, prediction): whether the token before, and the token predicted, is a function
    token."""
    function = torch.isin(seen.rows, torch.tensor(seen.function))
    return function[:, :-1], function[:, 1:]


def _losses(seen: Seen) -> np.ndarray:
    """(step, text, prediction): nats of every token but each text's first."""
    return np.stack([one.surprisal.values[:, 1:] for one in seen.found.values()])


def _kinds(found: xr.Dataset) -> np.ndarray:
    """(text, prediction): numbers of transitions, -1 inside a word."""
    return np.vectorize(("", *TRANSITIONS).index)(found.kind.values[:, 1:]) - 1


def _sums(values: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(step, text): sums over some of the predictions of a text."""
    return np.where(which, values, 0.0).sum(axis=-1)


def bigram_model(chances: Float[Tensor, "vocab vocab"]) -> LlamaForCausalLM:
    """A Llama whose next token depends on the last alone: chances[last, next], rows that sum to 1;
    an even vocabulary."""
    vocab = len(chances)
    sizes = {
        "hidden_size": vocab,
        "intermediate_size": vocab,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, **sizes, rms_norm_eps=1e-12, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # the final norm makes it sqrt(vocab) long
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.copy_(chances.clamp_min(1e-30).log().T / vocab**0.5)
    return model.eval()
