"""Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models.

Lv, Chen, Zhang, Wang, Liu, Wen, Xie and Yan, 2024. arXiv:2403.19521.
Claim: heads hand the subject to the last token, MLPs erase or amplify what heads wrote, a deep MLP
    writes the answer, and the last layer holds it back.
Methods: heads.argument_passing, heads.mlp_decomposition, heads.answer_suppression,
    editing.drop_heads
Protocol: the models of the paper on its prompts of factual recall; heads, MLPs and the last layer
    of each, all three readings of a lowered logit side by side.
What would change our mind: a last layer that lowers six answers in ten by all three readings, where
    the layer before does not; five heads, found on other countries, that carry three tenths of the
    difference where random ones carry nothing; one MLP of the second half that carries a tenth,
    where the others do not.
What the authors may object: our models have half a billion parameters at most, and one that
    answers few of the prompts has little to hold back; prompts are one relation, capitals, in our
    own words; into what they decompose an MLP and how they find heads we guessed, as we read the
    abstract alone.

The abstract leaves open how heads are found, into what an MLP is decomposed and what a lowered
logit is lowered from; the methods say what we chose, and all readings of the last are measured.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import stratoscope.models as models
from stratoscope.claims import Measured, claim
from stratoscope.editing import drop_heads
from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.pair import pair, random_like
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.heads import answer_suppression, argument_passing, mlp_decomposition
from stratoscope.lab import planted, tasks
from stratoscope.layers import direct_logit_attribution
from stratoscope.maths.resample import interval
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
    says="The last layer suppresses correct predictions",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="10 capitals",
    expect="lowered_low >= 0.6 and raw_lowered_low >= 0.6 and lens_lowered_low >= 0.6 and "
    "lowered_low > layer_before",
    direction="lowered_low > 0.5 and lowered > layer_before",
    null={"layer_before": "share of prompts whose answer the last layer but one lowers"},
    thresholds="0.6: the ledger's; 0.5 is a coin",
)
def the_last_layer_holds_the_answer_back(lm: LM, seed: int) -> Measured:
    """Sixty capital prompts. Share in which the last layer lowers the answer, by three readings of
    the abstract, which must agree: the answer's logit about the vocabulary's mean with the final
    norm held (lowered), the logit itself (raw_lowered), its log probability by the logit lens after
    and before the layer (lens_lowered). Intervals over capitals. right: share that the model
    answers; lowered_when_right: lowered among these."""
    asked = tasks.task("capitals")(lm.tokenizer, 60, seed)
    prompts, ids = list(asked.clean), list(asked.answer_ids)
    found, earlier = (
        answer_suppression.measure(lm, prompts, answer=ids, layer=layer, seed=seed)
        for layer in (-1, -2)
    )
    right = (last_logits(lm, prompts).argmax(dim=-1).cpu() == torch.tensor(ids)).numpy()
    readings = {"lowered": "change", "raw_lowered": "raw_change", "lens_lowered": "lens_change"}
    made = {
        name: interval((found[key].values < 0).astype(float), groups=asked.answers)
        for name, key in readings.items()
    }
    change = found.change.values
    last = lm.dims.layers - 1
    return Measured(
        values={name: (found[key].values < 0).mean() for name, key in readings.items()}
        | {"mean_change": change.mean(), "right": right.mean()}
        | ({"lowered_when_right": (change[right] < 0).mean()} if right.any() else {}),
        null={"layer_before": (earlier.change.values < 0).mean()},
        n=len({*asked.answers}),
        interval={name: (one.low, one.high) for name, one in made.items()},
        figure=label(
            np.concatenate([found.head_write.values.mean(axis=0), [found.mlp_write.values.mean()]]),
            "component",
            name="write_to_the_answer",
            method="heads.answer_suppression",
            provenance=lm.provenance,
            coords={
                "component": [f"L{last}H{head}" for head in range(lm.dims.heads)] + [f"L{last} mlp"]
            },
        ),
    )


@claim(
    says="Taking the suppressors of the last layer away raises the answer's probability",
    where="abstract",
    read="abstract",
    tier="small",
    side=True,
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="5 capitals",
    expect="removed_low > 0 and removed_low > random_bound and removed_low > elsewhere_bound",
    direction="removed > 0 and removed > random and removed > elsewhere",
    null={
        "random": "as many heads of the last layer that are none of them, drawn at random",
        "elsewhere": "as many heads of the other layers, from the third on, drawn at random",
    },
)
def removing_suppressors_helps(lm: LM, seed: int) -> Measured:
    """Sixty capital prompts. The third of the last layer's heads that write most against the answer
    is found on one half of the capitals and set to zero on the other half, at the last token
    (`editing.drop_heads`). removed: mean rise of the answer's probability there."""
    asked = tasks.task("capitals")(lm.tokenizer, 60, seed)
    generator, layers, heads = random.Random(seed), lm.dims.layers, lm.dims.heads
    names = sorted({*asked.answers})
    finding = np.isin(asked.answers, generator.sample(names, len(names) // 2))
    some, held = (np.flatnonzero(which).tolist() for which in (finding, ~finding))
    prompts, ids = list(asked.clean), list(asked.answer_ids)
    found = answer_suppression.measure(
        lm, [prompts[i] for i in some], answer=[ids[i] for i in some], seed=seed
    )
    against = answer_suppression.suppressors(found, max(1, round(heads / 3)))
    beside = [(layers - 1, head) for head in range(heads) if (layers - 1, head) not in against]
    others = [(layer, head) for layer in range(2, layers - 1) for head in range(heads)]
    size = len(against)
    sets = [against, *(generator.sample(beside, min(size, len(beside))) for _ in range(DRAWS))]
    sets += [generator.sample(others, size) for _ in range(DRAWS)]
    edits = [drop_heads.edit(lm, each, positions=-1) for each in sets]
    answer = torch.tensor([ids[i] for i in held])
    cells = [list(edit.interventions) for edit in edits]
    rise = _rise(lm, [prompts[i] for i in held], answer, cells).numpy()
    by_set, capitals = rise.mean(axis=1), [asked.answers[i] for i in held]
    made = interval(rise[0], groups=capitals)
    return Measured(
        values={"removed": by_set[0]},
        null={"random": by_set[1 : 1 + DRAWS], "elsewhere": by_set[1 + DRAWS :]},
        n=len({*capitals}),
        interval={"removed": (made.low, made.high)},
        note=f"Suppressors: {', '.join(f'L{a}H{b}' for a, b in against)}. {len(held)} prompts held "
        "out.",
    )


@claim(
    says="Task-specific heads extract the subject from the context and pass it to what comes after",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="5 capitals",
    expect="passed_low >= 0.3 and passed >= 3 * random and passed_low > random_bound",
    direction="passed >= 2 * random and passed_low > random_bound",
    null={"random": "as many heads of all layers, the first two with them, drawn at random"},
    thresholds="0.3, 3 and 2: the ledger's",
)
def few_heads_pass_the_subject(lm: LM, seed: int) -> Measured:
    """Capital prompts in pairs. On one half of the countries the five heads of highest attention *
    effect are found; on the other half their z at the last token is replaced together by that of
    the prompt about another country. passed: the share of the logit difference that is lost,
    interval over capitals."""
    some, rest = _apart(lm, seed)
    found = argument_passing.measure(
        lm, some.clean, corrupt=some.corrupt, answer=some.answer, foil=some.foil, seed=seed
    )
    score = (found.attention * found.effect).mean("example").values
    best = [divmod(int(i), lm.dims.heads) for i in score.ravel().argsort()[::-1][:5]]
    generator = random.Random(seed)
    every = [(layer, head) for layer in range(lm.dims.layers) for head in range(lm.dims.heads)]
    sets = [best, *(generator.sample(every, 5) for _ in range(DRAWS))]
    both = pair(lm, rest.clean, rest.corrupt, rest.answer, rest.foil, "noise")
    z = capture(lm, both.source, "layers.*.attn.z", positions=-1).stack("layers.*.attn.z")[
        :, :, None
    ]
    cells = [
        [replaced(f"layers.{i}.attn.z", z[i, :, :, [h]], positions=-1, units=[h]) for i, h in heads]
        for heads in sets
    ]
    lost = both.normalise(sweep(lm, both.base, cells, both.target.difference)).numpy()
    made = interval(lost[0], groups=rest.answer)
    return Measured(
        values={
            "passed": lost[0].mean(),
            "attention": _at(found.attention.mean("example").values, best),
        },
        null={"random": lost[1:].mean(axis=1)},
        n=len({*rest.answer}),
        interval={"passed": (made.low, made.high)},
        figure=label(
            [_at(found.effect.mean("example").values, [head]) for head in best],
            "component",
            name="effect",
            method="heads.argument_passing",
            provenance=lm.provenance,
            coords={"component": [f"L{layer}H{head}" for layer, head in best]},
        ),
        note=f"Heads found on {len(some.clean)} prompts, judged on {len(rest.clean)} about other "
        "countries.",
    )


@claim(
    says="A deep MLP takes the subject and writes what turns the stream towards the answer",
    where="abstract (step 3)",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
    n="5 capitals",
    expect="depth >= 0.5 and written_low > 0 and lost_low >= 0.1 and lost_low > random_bound and "
    "lost_low > others_high",
    direction="written_low > 0 and lost_low > random_bound",
    null={
        "random": "the same MLP's output moved as far in a random direction",
        "others": "the mean over the MLPs of all other layers",
    },
    thresholds="deep: the second half of the layers; 0.1, a tenth of the logit difference from one "
    "MLP, the smallest effect that would matter: ours, the abstract gives no number",
)
def a_deep_mlp_writes_the_answer(lm: LM, seed: int) -> Measured:
    """Capital prompts in pairs. On one half of the countries the MLP is found whose output at the
    last token, replaced by that of the prompt about another country, takes most of the logit
    difference with it; it is judged on the other half. lost: the share that is lost there; written:
    what it writes straight to the answer's logit about the vocabulary's mean; depth: its layer over
    the last one. The same by hand: `layers.activation_patching` at mlp.out,
    `layers.direct_logit_attribution`."""
    some, rest = _apart(lm, seed)
    best = int(_mlps(lm, some, range(lm.dims.layers)).mean(axis=1).argmax())
    lost = _mlps(lm, rest, range(lm.dims.layers))
    others = np.delete(lost, best, axis=0).mean(axis=0)
    drawn = _mlps(lm, rest, [best] * DRAWS, seed=seed).mean(axis=1)
    told = direct_logit_attribution.measure(lm, rest.clean, answer=rest.answer, foil=rest.foil)
    here = ((told.kind == "mlp") & (told.layer == best)).values
    written = told.raises_answer.values[:, here][:, 0]
    numbers = {"lost": lost[best], "written": written, "others": others}
    made = {name: interval(x, groups=rest.answer) for name, x in numbers.items()}
    return Measured(
        values={"lost": lost[best].mean(), "written": written.mean()}
        | {"depth": best / (lm.dims.layers - 1), "layer": best},
        null={"random": drawn, "others": others.mean()},
        n=len({*rest.answer}),
        interval={name: (one.low, one.high) for name, one in made.items()},
        figure=label(
            lost.mean(axis=1),
            "layer",
            name="share_of_the_difference_lost",
            method="layers.activation_patching",
            provenance=lm.provenance,
            coords={"layer": list(range(lm.dims.layers))},
        ),
        note=f"MLP of layer {best}, found on {len(some.clean)} prompts, judged on "
        f"{len(rest.clean)} about other countries.",
    )


@claim(
    says="MLPs erase or amplify what individual heads wrote",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b"),
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


@dataclass(frozen=True)
class _Pairs:
    """Prompts about a country and about another; the ids of the capitals."""

    clean: list[str]
    corrupt: list[str]
    answer: list[int]
    foil: list[int]


def _apart(lm: LM, seed: int) -> tuple[_Pairs, _Pairs]:
    """Pairs of capital prompts to find with and to judge by; no country stands in both."""
    asked = tasks.task("capitals")(lm.tokenizer, 80, seed)
    names = sorted({*asked.answer_ids, *asked.foil_ids})
    first = {*random.Random(seed).sample(names, len(names) // 2)}
    found = []
    for inside in (True, False):
        rows = [
            i
            for i, ids in enumerate(zip(asked.answer_ids, asked.foil_ids))
            if all((x in first) == inside for x in ids)
        ]
        columns = (asked.clean, asked.corrupt, asked.answer_ids, asked.foil_ids)
        found.append(_Pairs(*([column[i] for i in rows] for column in columns)))
    return found[0], found[1]


def _mlps(lm: LM, of: _Pairs, layers: Sequence[int], seed: int | None = None) -> np.ndarray:
    """(cell, example) the share of the logit difference lost when the MLP's output at the last
    token of one of `layers` is that of the corrupt prompt; given a seed, moved as far at random."""
    both = pair(lm, of.clean, of.corrupt, of.answer, of.foil, "noise")
    site = "layers.*.mlp.out"
    base, source = (
        capture(lm, batch, site, positions=-1).stack(site)[:, :, None]
        for batch in (both.base, both.source)
    )
    if seed is not None:
        several = [random_like(base, source, seed + draw) for draw in range(len(layers))]
    else:
        several = [source] * len(layers)
    cells = [
        replaced(f"layers.{layer}.mlp.out", value[layer], positions=-1)
        for layer, value in zip(layers, several)
    ]
    return both.normalise(sweep(lm, both.base, cells, both.target.difference)).numpy()


def _rise(lm: LM, prompts: list[str], answer: Tensor, cells: list[list[Intervention]]) -> Tensor:
    """How much the answer's probability rises: (cell, example)."""

    def said(logits: Tensor, example: Tensor) -> Tensor:
        return answer_suppression.log_probability(logits, answer[example.cpu()]).exp()

    return sweep(lm, prompts, cells, said) - said(
        last_logits(lm, prompts), torch.arange(len(prompts))
    )


def _at(table: np.ndarray, heads: list[tuple[int, int]]) -> float:
    return float(np.mean([table[head] for head in heads]))
