"""Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models.

Lv, Chen, Zhang, Wang, Liu, Wen, Xie and Yan, 2024. arXiv:2403.19521.
Claim: heads hand the subject to the last token, MLPs erase or amplify what heads wrote, and the
    last layer holds the right answer back.
Methods: heads.argument_passing, heads.mlp_decomposition, heads.answer_suppression
Protocol: the models of the paper on its prompts of factual recall; heads, MLPs and the last layer
    of each, all three readings of a lowered logit side by side.

The abstract leaves open how heads are found, into what an MLP is decomposed and what a lowered
logit is lowered from; the methods say what we chose.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.engine.intervene import Intervention, ablate, replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.pair import pair
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.heads import answer_suppression, argument_passing, mlp_decomposition
from stratoscope.lab import planted, tasks
from stratoscope.models import LM
from stratoscope.results import label

DRAWS = 20  # random sets of heads


@claim(
    says="Heads pass the argument, and a late head speaks against the answer that was found",
    where="abstract",
    tier="identity",
    subject="planted.suppression",
    expect="attention > 0.9 and passed > 1 and written < -4 and gained > 0 and gained > 2 * random",
    null={"random": "the opponent's z moved as far in a random direction"},
)
def both_planted_heads_are_named(seed: int) -> Measured:
    """A hand-built model in which one head copies a name for a logit of 15 and another takes back 5
    of it."""
    p = planted.suppression()
    lm = models.wrap(p.model, p.tokenizer)
    [mover], [(layer, head)] = p.heads, p.opposing_heads
    passing = argument_passing.measure(
        lm, p.clean, corrupt=p.corrupt, answer=p.answer, foil=p.foil, seed=seed
    )
    against = answer_suppression.measure(lm, p.clean, answer=p.answer, layer=layer, seed=seed)
    return Measured(
        values={
            "attention": passing.attention[0][mover],
            "passed": passing.effect[0][mover],
            "written": against.head_write[0, head],
            "gained": against.removal[0, head],
        },
        null={"random": abs(against.null[0, head])},
        n=1,
    )


@claim(
    says="An MLP's output can be decomposed into multiples of what the heads wrote",
    where="abstract, which leaves open into what; multiples of the heads are our reading",
    tier="identity",
    subject="random vectors",
    expect="error < 0.000001 and explained > 0.999999 and shuffled < 0.5",
    null={"shuffled": "the same fit on the heads of another prompt"},
)
def known_multiples_come_back(seed: int) -> Measured:
    """An output made as -1 times one head, 0.5 times another and a constant: least squares gives
    these numbers."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(8, 3, 16, generator=generator, dtype=torch.double)
    true = torch.tensor([-1.0, 0.5, 0.0], dtype=torch.double)
    out = torch.einsum("p,epd->ed", true, parts) + 1
    coefficient, intercept, explained = mlp_decomposition.decompose(out, parts)
    error = max(float((coefficient - true).abs().max()), float((intercept - 1).abs().max()))
    shuffled = mlp_decomposition.decompose(out, parts.roll(1, dims=0))[2]
    return Measured(
        values={"error": error, "explained": explained}, null={"shuffled": shuffled}, n=8
    )


@claim(
    says="The last layer suppresses correct predictions; taking its suppressors away "
    "raises the answer's probability",
    where="abstract",
    read="abstract",
    tier="small",
    subject="smollm2",
    kind="real",
    n="60 prompts",
    expect="lowered >= 0.6 and removed > 0 and removed > random and removed > elsewhere",
    direction="lowered > 0.5 and removed > random",
    null={
        "random": "as many heads of the last layer, drawn at random",
        "elsewhere": "as many heads of the other layers, drawn at random",
    },
    thresholds="0.6: the ledger's; 0.5 is a coin",
)
def the_last_layer_holds_the_answer_back(seed: int) -> Measured:
    """Capital prompts. lowered: share in which the last layer lowers the answer's logit about the
    vocabulary's mean, the final norm held. On the capitals of one half the three heads that write
    most against the answer are found; on the other half they are set to zero at the last token.
    removed: the mean rise of the answer's probability there. lens_lowered, for comparison: share in
    which the logit lens gives the answer less probability after the layer."""
    return _suppression("smollm2", seed)


@claim(
    says="The last layer suppresses correct predictions; taking its suppressors away "
    "raises the answer's probability",
    where="abstract",
    read="abstract",
    tier="small",
    subject="gemma3-270m",
    kind="real",
    n="60 prompts",
    expect="lowered >= 0.6 and removed > 0 and removed > random and removed > elsewhere",
    direction="lowered > 0.5 and removed > random",
    null={
        "random": "as many heads of the last layer, drawn at random",
        "elsewhere": "as many heads of the other layers, drawn at random",
    },
    thresholds="0.6: the ledger's; 0.5 is a coin",
)
def the_last_layer_of_gemma_holds_the_answer_back(seed: int) -> Measured:
    """The same on a second model, with one of its four heads: the paper calls the mechanism
    universal. This claim was added after SmolLM2 had failed the one above, with the same words and
    thresholds."""
    return _suppression("gemma3-270m", seed, size=1)


@claim(
    says="Taking the suppressors of the last layer away raises the answer's probability",
    where="abstract",
    read="abstract",
    tier="small",
    side=True,
    subject="smollm2",
    kind="real",
    n="60 prompts",
    expect="removed > 0 and removed > random and removed > elsewhere",
    null={
        "random": "as many heads of the last layer, drawn at random",
        "elsewhere": "as many heads of the other layers, drawn at random",
    },
)
def removing_suppressors_helps(seed: int) -> Measured:
    """The second half of the joint claim, with its words unchanged. It was set apart after a trial
    with another seed had shown that the first half fails: here the last layer as a whole raises the
    answer, and some of its heads lower it."""
    return _suppression("smollm2", seed)


def _suppression(name: str, seed: int, size: int = 3) -> Measured:
    """Find the `size` heads that write most against half of the capitals; take them out on the
    other half."""
    lm = models.load(name)
    asked = tasks.task("capitals")(lm.tokenizer, 60, seed)
    prompts, ids = list(asked.clean), torch.tensor(asked.answer_ids)
    found = answer_suppression.measure(lm, prompts, answer=list(asked.answer_ids), seed=seed)
    logits = last_logits(lm, prompts)
    right = (logits.argmax(dim=-1).cpu() == ids).numpy()
    last, (layers, heads) = lm.dims.layers - 1, (lm.dims.layers, lm.dims.heads)
    before = capture(lm, prompts, f"layers.{last}.resid_pre", positions=-1)[
        f"layers.{last}.resid_pre"
    ]
    said = [answer_suppression.log_probability(x, ids) for x in (lm.readout(before), logits)]
    generator = random.Random(seed)
    names = sorted(set(asked.answers))
    finding = np.isin(asked.answers, generator.sample(names, len(names) // 2))
    against = found.head_write.values[finding].mean(axis=0).argsort()[:size].tolist()
    sets = [[(last, head) for head in against]]
    sets += [[(last, head) for head in generator.sample(range(heads), size)] for _ in range(DRAWS)]
    others = [(layer, head) for layer in range(layers - 1) for head in range(heads)]
    sets += [generator.sample(others, size) for _ in range(DRAWS)]
    held = np.flatnonzero(~finding).tolist()
    rise = _rise(lm, [prompts[i] for i in held], ids[held], [_without(some) for some in sets])
    by_set, change = rise.mean(dim=1), found.change.values
    return Measured(
        values={
            "raw_lowered": (found.raw_change.values < 0).mean(),
            "lens_lowered": (said[1] < said[0]).float().mean(),
            "mean_change": change.mean(),
            "right": right.mean(),
        }
        | ({"lowered_when_right": (change[right] < 0).mean()} if right.any() else {}),
        null={"random": by_set[1 : 1 + DRAWS], "elsewhere": by_set[1 + DRAWS :]},
        n=len(asked),
        units={"lowered": change < 0, "removed": rise[0].numpy()},
        figure=label(
            np.concatenate([found.head_write.values.mean(axis=0), [found.mlp_write.values.mean()]]),
            "component",
            name="write_to_the_answer",
            method="heads.answer_suppression",
            provenance=lm.provenance,
            coords={"component": [f"L{last}H{head}" for head in range(heads)] + [f"L{last} mlp"]},
        ),
        note=f"Suppressors: heads {against} of layer {last}. {int((~finding).sum())} prompts held "
        "out.",
    )


@claim(
    says="Task-specific heads extract the subject from the context and pass it to what comes after",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="12 prompts",
    expect="passed >= 0.3 and passed >= 3 * random",
    direction="passed >= 2 * random",
    null={"random": "as many heads drawn at random"},
    thresholds="0.3, 3 and 2: the ledger's",
)
def few_heads_pass_the_subject(lm: LM, seed: int) -> Measured:
    """Capital prompts in pairs. On one half the five heads of highest attention * effect are found;
    on the other half their z at the last token is replaced together by that of the prompt about
    another country. passed: the share of the logit difference that is lost."""
    asked = tasks.task("capitals")(lm.tokenizer, 24, seed)
    some = slice(0, 12)
    found = argument_passing.measure(
        lm, list(asked.clean[some]), corrupt=list(asked.corrupt[some]),
        answer=list(asked.answer_ids[some]), foil=list(asked.foil_ids[some]), seed=seed,
    )  # fmt: skip
    score = (found.attention * found.effect).mean("example").values
    best = [divmod(int(i), lm.dims.heads) for i in score.ravel().argsort()[::-1][:5]]
    generator = random.Random(seed)
    every = [(layer, head) for layer in range(lm.dims.layers) for head in range(lm.dims.heads)]
    sets = [best, *(generator.sample(every, 5) for _ in range(DRAWS))]
    rest = slice(12, None)
    both = pair(
        lm, list(asked.clean[rest]), list(asked.corrupt[rest]),
        list(asked.answer_ids[rest]), list(asked.foil_ids[rest]), "noise",
    )  # fmt: skip
    z = capture(lm, both.source, "layers.*.attn.z", positions=-1).stack("layers.*.attn.z")[
        :, :, None
    ]
    cells = [
        [replaced(f"layers.{i}.attn.z", z[i, :, :, [h]], positions=-1, units=[h]) for i, h in heads]
        for heads in sets
    ]
    lost = both.normalise(sweep(lm, both.base, cells, both.target.difference))
    return Measured(
        values={
            "attention": _at(found.attention.mean("example").values, best),
        },
        null={"random": lost[1:].mean(dim=1)},
        n=lost.shape[1],
        units={"passed": lost[0].numpy()},
        figure=label(
            [_at(found.effect.mean("example").values, [head]) for head in best],
            "component",
            name="effect",
            method="heads.argument_passing",
            provenance=lm.provenance,
            coords={"component": [f"L{layer}H{head}" for layer, head in best]},
        ),
        note="Heads found on 12 other prompts; a country may stand in both halves.",
    )


@claim(
    says="MLPs erase or amplify what individual heads wrote",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m"),
    n="20 prompts",
    expect="explained >= 0.2 and explained >= 2 * shuffled",
    direction="explained > shuffled",
    null={"shuffled": "the same fit on heads and stream of another prompt"},
    thresholds="0.2 and 2: ours; the abstract gives none",
)
def mlps_are_partly_multiples_of_heads(lm: LM, seed: int) -> Measured:
    """Sixty capital prompts of one template each: R2, about the prompts' mean, of every layer's MLP
    output at the last token as multiples of its heads and of the stream before, averaged over
    layers. The threshold is ours: the abstract gives none."""
    prompts = [
        text
        for text in tasks.task("capitals")(lm.tokenizer, 120, seed).clean
        if text.endswith(" is")
    ]
    prompts = list(dict.fromkeys(prompts))
    found = mlp_decomposition.measure(lm, prompts)
    return Measured(
        values={
            "explained": found.explained.mean(),
            "erased": (found.coefficient < 0).mean(),
            "best_layer": found.explained.argmax("layer"),
        },
        null={"shuffled": found.null.mean()},
        n=len(prompts),
        figure=found.explained.rename("explained").drop_attrs().assign_attrs(found.attrs),
        note=f"Layers: {float(found.explained.min()):.2f} to {float(found.explained.max()):.2f}.",
    )


def _without(heads: list[tuple[int, int]]) -> list[Intervention]:
    return [ablate(f"layers.{layer}.attn.z", units=[head], positions=-1) for layer, head in heads]


def _rise(lm: LM, prompts: list[str], answer: Tensor, cells: list[list[Intervention]]) -> Tensor:
    """How much the answer's probability rises: (cell, example)."""

    def said(logits: Tensor, example: Tensor) -> Tensor:
        return answer_suppression.log_probability(logits, answer[example.cpu()]).exp()

    return sweep(lm, prompts, cells, said) - said(
        last_logits(lm, prompts), torch.arange(len(prompts))
    )


def _at(table: np.ndarray, heads: list[tuple[int, int]]) -> float:
    return float(np.mean([table[head] for head in heads]))
