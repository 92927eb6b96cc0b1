"""Memory Retrieval and Consolidation in Large Language Models through Function Tokens.

Zhang, Lin and Li, 2025. arXiv:2510.08203.
Claim: function tokens activate the most predictive features of the context, and training is
    dominated by predicting the content tokens that follow them; function tokens themselves are
    learned first.
Methods: tokens.transition_loss
Protocol: a 1.5B model trained on SlimPajama with all its checkpoints, function tokens counted on
    the same corpus (122 that cover 40 %); loss by transition at each checkpoint; for the other
    half a sparse autoencoder of a middle layer.

Of the paper's two halves this is the loss. The other (ten tokens activate most features) needs a
sparse autoencoder and waits for one.

Function tokens are the paper's: the most frequent ones that cover 40 % of a corpus (section 2.2:
122 of LLaMA-3.1's, on SlimPajama). Here they are counted on other text, Wikipedia prose, by each
model's own tokenizer. The paper adds tokens "until" 40 % are covered; whether the last one counts
is left open, and here it does. "Dominated" the paper shows by the mean loss of a prediction (Figure
9; its 1.5B model ends at 4.88 nats for function->content, 3.69 content->content, 2.12
function->function, 1.90 content->function) and prints no share of the whole loss. Here both are
asked for, and that it matters which token stands before (the null): that rare tokens are harder is
true of any model, also of a unigram one. Word pieces are tokens like any other, as in the paper;
ratio_between_words counts only predictions that begin a word.
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
from stratoscope.models import LM
from stratoscope.tokens import transition_loss
from stratoscope.tokens.transition_loss import TRANSITIONS

CC, FC = TRANSITIONS.index("content->content"), TRANSITIONS.index("function->content")
TEXTS, LENGTH, DRAWS = 64, 256, 200
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
    n="64 texts",
    expect="share_lead > 0 and loss_lead > 0 and ratio > dealt",
    direction="share > predictions and ratio > dealt",
    null={
        "dealt": "95th percentile of ratio when the labels of the tokens before are dealt "
        "out anew to token types that together occur as often, while what is "
        "predicted keeps its label"
    },
)
def content_after_function_throughout_training(seed: int) -> Measured:
    """Every checkpoint of tiny-gpt after the untrained one, on 64 windows of held-out Wikipedia
    prose.

    share_lead and loss_lead are the least over checkpoints of how far function->content is ahead of
    the next largest group, in its share of all loss and in nats a prediction; ratio is its loss
    over content->content's at the last one. In the tiny-gpt of before, which a table of bigrams
    surpassed, ratio was 1.02 on seed 0 (null 1.03): nothing was to be seen. Now it is 1.23, but
    0.98 among predictions that begin a word (`ratio_between_words`): content->content is easier
    because it goes on inside words, and of whole words nothing is shown.
    """
    return _dominance(_tiny_gpt(seed), seed)


@claim(
    says="The training loss is dominated by predicting the content tokens that follow "
    "function tokens",
    where="abstract; section 4.3, Figure 9",
    read="full text",
    tier="small",
    subject="smollm2",
    kind="real",
    n="64 texts",
    expect="share_lead > 0 and loss_lead > 0 and ratio > dealt",
    direction="share > predictions and ratio > dealt",
    null={
        "dealt": "95th percentile of ratio when the labels of the tokens before are dealt "
        "out anew to token types that together occur as often, while what is "
        "predicted keeps its label"
    },
)
def content_after_function_at_the_end(seed: int) -> Measured:
    """The finished SmolLM2, on 64 windows of held-out Wikipedia prose: how its loss is divided,
    after training.

    share_lead and loss_lead are how far function->content is ahead of the next largest group, in
    its share of all loss and in nats a prediction; ratio is its loss over content->content's.
    """
    return _dominance(_seen({"trained": "smollm2"}, seed), seed)


@claim(
    says="Function tokens are learned faster, and their loss ends lower",
    where="section 4.3, Figure 9",
    read="full text",
    tier="small",
    subject="tiny-gpt",
    kind="miniature",
    n="64 texts",
    expect="lead > dealt and function < content",
    direction="lead > 0 and function < content",
    null={
        "dealt": "95th percentile of lead when the labels of the tokens predicted are "
        "dealt out anew to token types that together occur as often"
    },
)
def function_tokens_are_learned_first(seed: int) -> Measured:
    """How much of its whole fall from the untrained to the last checkpoint a kind's loss has behind
    it, on the way there.

    lead is the mean over the checkpoints between of function's part less content's; function and
    content are the losses at the end, in nats. (The least was tried first, on a toy of seed 7: it
    is that of a checkpoint which has learned nothing yet.) That what is frequent is learned first
    is no wonder; the claim is the paper's.
    """
    seen = _tiny_gpt(seed)
    loss = np.stack([one.surprisal.values[:, 1:].ravel() for one in seen.found.values()])
    function = _kinds(seen.last).ravel() % 2 == 1  # of the token predicted
    after, generator = seen.rows[:, 1:].flatten(), torch.Generator().manual_seed(seed)
    counts, occurrences = torch.bincount(after), int(function.sum())
    anew = (
        transition_loss.dealt(counts, occurrences, generator)[after].numpy() for _ in range(DRAWS)
    )
    return Measured(
        values={
            "lead": learned(loss, function),
            "function": loss[-1, function].mean(),
            "content": loss[-1, ~function].mean(),
        },
        null={"dealt": np.quantile([learned(loss, kind) for kind in anew], 0.95)},
        n=TEXTS,
        figure=xr.DataArray(
            np.array([one.loss.values for one in seen.found.values()]).T,
            {"transition": list(TRANSITIONS), "step": list(seen.found)},
            ["transition", "step"],
            name="nats a prediction",
        ),
    )


def learned(loss: np.ndarray, function: np.ndarray) -> float:
    """Part of their whole fall that the function tokens' losses (step, prediction) have behind
    them, less that of the content tokens': the mean over the steps between the first and the
    last."""
    curves = np.stack([loss[:, function].mean(axis=1), loss[:, ~function].mean(axis=1)])
    fallen = (curves[:, :1] - curves[:, 1:-1]) / (curves[:, :1] - curves[:, -1:])
    return float((fallen[0] - fallen[1]).mean())


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


def _seen(steps: Mapping[Any, str | Path], seed: int) -> Seen:
    """The same windows measured at each step; the tokenizer must be the same for all."""
    lm = models.load(next(iter(steps.values())))
    function, rows = _function(lm), _windows(lm, seed)
    found = {}
    for step, name in steps.items():
        found[step] = transition_loss.measure(
            models.load(name), rows, function=function, draws=DRAWS, seed=seed
        )
    return Seen(lm, rows, function, found)


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
    last, kind, generator = seen.last, _kinds(seen.last), np.random.default_rng(seed)
    loss = np.stack([one.surprisal.values[:, 1:] for step, one in seen.found.items() if step != 0])
    total, count = _sums(loss, kind), _sums(np.ones_like(loss), kind)
    words = np.where(_begins_a_word(last), kind, -1)
    total_words, count_words = _sums(loss[-1:], words), _sums(np.ones_like(loss[-1:]), words)

    def numbers(texts: np.ndarray) -> dict[str, float]:
        whole = leads(total_words[:, texts].sum(1), count_words[:, texts].sum(1))
        return leads(total[:, texts].sum(1), count[:, texts].sum(1)) | {
            "ratio_between_words": whole["ratio"]
        }

    found, n = numbers(np.arange(len(kind))), len(kind)
    drawn = [numbers(texts) for texts in generator.integers(n, size=(1000, n))]
    whole = total_words.sum(1)[-1] / count_words.sum(1)[-1]
    theirs = PAPER * last.prediction_share.values / (PAPER * last.prediction_share.values).sum()
    named = " ".join(repr(seen.lm.tokenizer.decode([i])) for i in seen.function[:12])
    each = [
        f"{name} {last.loss_share[k]:.3f}, {last.prediction_share[k]:.3f}, {last.loss[k]:.2f}, "
        f"{whole[k]:.2f}"
        for k, name in enumerate(TRANSITIONS)
    ]
    return Measured(
        values={
            **found,
            "share": last.loss_share[FC],
            "predictions": last.prediction_share[FC],
            "loss": last.loss[FC],
        },
        null={"dealt": (last.null_loss[:, FC] / last.null_loss[:, CC]).quantile(0.95)},
        n=n,
        interval={
            name: np.quantile([one[name] for one in drawn], (0.025, 0.975)) for name in found
        },
        figure=xr.DataArray(
            [last.prediction_share.values, last.loss_share.values],
            {"of": ["predictions", "loss"], "transition": list(TRANSITIONS)},
            ["of", "transition"],
            name="share",
        ),
        note=f"{len(seen.function)} function tokens: {named} ... Share of the loss, share of the "
        "predictions, nats a "
        f"prediction, and nats where a word begins: {'; '.join(each)}. ratio_between_words is the "
        "ratio of the last. The "
        "paper's means at these shares of predictions would make content->content "
        f"{theirs[CC]:.3f} of the loss, "
        f"function->content {theirs[FC]:.3f}.",
    )


def leads(total: np.ndarray, count: np.ndarray) -> dict[str, float]:
    """How far function->content is ahead, from nats and predictions, both summed: (step,
    transition)."""
    share, loss, others = (
        total / total.sum(axis=1, keepdims=True),
        total / count,
        np.arange(len(TRANSITIONS)) != FC,
    )
    ahead = [x[:, FC] - x[:, others].max(axis=1) for x in (share, loss)]
    return {
        "share_lead": ahead[0].min(),
        "loss_lead": ahead[1].min(),
        "ratio": loss[-1, FC] / loss[-1, CC],
    }


def _kinds(found: xr.Dataset) -> np.ndarray:
    """(text, prediction): numbers of transitions."""
    return np.vectorize(TRANSITIONS.index)(found.kind.values[:, 1:])


def _sums(values: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """(step, text, transition): sums over the predictions of a text."""
    return np.stack(
        [np.where(kind == k, values, 0.0).sum(axis=2) for k in range(len(TRANSITIONS))], axis=2
    )


def _begins_a_word(found: xr.Dataset) -> np.ndarray:
    """(text, prediction): whether the token does not go on with letters or digits after letters or
    digits."""
    text = found.text.values
    inside = np.vectorize(lambda before, after: before[-1:].isalnum() and after[:1].isalnum())
    return ~inside(text[:, :-1], text[:, 1:])


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
