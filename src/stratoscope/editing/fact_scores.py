"""Fact scores: whether an edited model says the new fact, also in other words, and still says the
old ones that stand beside it.

Paper: textbook (Meng et al., "Locating and editing factual associations in GPT", 2022; the same
numbers before the edit, and intervals, are ours)

    p(target | prompt) = exp of the mean over its tokens of ln p(token | prompt, tokens before it)
    efficacy, paraphrase:  share of prompts with p(target_new) > p(target_true)
    specificity:           share of neighbour prompts with p(target_true) > p(target_new)

Neighbours are prompts about other subjects of which target_true is true as well ("The capital of
the Île-de-France is"), so that an edit which says the new target everywhere loses there what it
gains elsewhere. `summary` gives the shares and mean probabilities, before and after, with intervals
over facts (over prompts, where there is one fact).

Reads as: what the edit does to the sentences that were asked. Does not show what it does to others:
a fact follows from others and others from it, and neighbours are few; the unedited model and a null
(`rome.random_key`, `editing.jitter`) say how much of a score is the edit's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.editing import _facts
from stratoscope.editing._facts import Fact, Text
from stratoscope.engine import sequence
from stratoscope.engine.continued import continued
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import Whole, last_logits
from stratoscope.errors import InputError
from stratoscope.maths.resample import interval
from stratoscope.models.lm import LM
from stratoscope.results import dataset

AXES = {
    "prompt": "one of the prompts by which a fact is asked",
    "kind": "why a prompt is asked: rewrite (the fact itself), paraphrase or neighbour",
    "state": "of the model: before an edit, or after it",
}
KINDS = ("rewrite", "paraphrase", "neighbour")
_TOGETHER = 64  # prompts that run at the same time


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, after: Edit | str | Path | None = None) -> xr.Dataset:
    """new, true (example, prompt): probability of a token of each target, on the model as it is;
    with an edit, new_after and true_after, inside it. asked says of each prompt why it is asked.

    inputs: facts with target_new and target_true, each with a list of paraphrases and of neighbours
    where there are some. after: an edit, or the file it was saved to. Raises InputError for a list
    that is empty, targets that are the same, or an edit of another model; SiteError unless the
    model is a causal LM; LoadError for a file that holds no edit.
    """
    _facts.refuse(lm)
    after = Edit.load(lm, after) if isinstance(after, str | Path) else after
    if after is not None and after.lm.model is not lm.model:
        raise InputError("after: an edit of another model; make it for this one.")
    found = _facts.facts(inputs, ("prompt", "target_new", "target_true"))
    every = [_prompts(fact) for fact in found]
    rows = [_facts.ids_of(lm, text) for prompts in every for _, text in prompts]
    pairs = [_targets(lm, fact, text) for fact, own in zip(found, every) for _, text in own]
    counts = [len(prompts) for prompts in every]
    variables = {}
    for suffix, change in (("", nullcontext()), ("_after", after)):
        if change is not None:
            with change:
                said = _log_probabilities(lm, rows, pairs).exp().split(counts)
            for side, name in enumerate(("new", "true")):
                values = [one[:, side] for one in said]
                table = torch.nn.utils.rnn.pad_sequence(values, True, torch.nan)
                variables[f"{name}{suffix}"] = (("example", "prompt"), table)
    texts = [lm.batch([row]).texts[0] for row in rows]
    begin = np.cumsum([0, *counts])
    words = [texts[a:b] for a, b in pairwise(begin)]
    kinds = [[kind for kind, _ in prompts] for prompts in every]
    lacking = [kind for kind in KINDS[1:] if not any(kind in own for own in kinds)]
    note = f"No {' and no '.join(lacking)} was asked." if lacking else ""
    return dataset(
        variables,
        method="editing.fact_scores",
        provenance=lm.provenance,
        settings={"after": after.note if after is not None else ""},
        coords={
            "asked": (("example", "prompt"), _padded(kinds)),
            "prompt_text": (("example", "prompt"), _padded(words)),
            "example_text": (("example",), [own[0] for own in words]),
            "target_new": (("example",), [str(fact["target_new"]) for fact in found]),
            "target_true": (("example",), [str(fact["target_true"]) for fact in found]),
        },
        notes=note,
    )


def summary(result: xr.Dataset, *, level: float = 0.95, seed: int = 0) -> xr.Dataset:
    """share (kind, state) of prompts where the wanted target is the likelier, and p, its mean
    probability, each with _low and _high; n (kind), of independent units: facts, or the prompts
    where there is one fact; prompts (kind), how many were asked.

    result: as `measure` gives it. Intervals are cut at 0 and 1; NaN for fewer than five units, and
    where all are alike: of n that are, three in n (at 95 %) may still be otherwise. NaN throughout
    for what was not asked.
    """
    states = ["before", *(["after"] if "new_after" in result else [])]
    asked, facts = result.asked.values, result.sizes["example"]
    of = np.broadcast_to(np.arange(facts)[:, None], asked.shape)
    shape = (len(KINDS), len(states))
    names = [f"{what}{end}" for what in ("share", "p") for end in ("", "_low", "_high")]
    found = {name: np.full(shape, np.nan) for name in names}
    units, prompts = np.zeros(len(KINDS), dtype=int), np.zeros(len(KINDS), dtype=int)
    for k, kind in enumerate(KINDS):
        here = asked == kind
        prompts[k] = here.sum()
        groups = of[here] if facts > 1 else None
        units[k] = len(set(of[here])) if facts > 1 else here.sum()
        for s, suffix in enumerate(("", "_after")[: len(states)] if here.any() else ()):
            new, true = (result[f"{name}{suffix}"].values[here] for name in ("new", "true"))
            wanted, other = (true, new) if kind == "neighbour" else (new, true)
            for what, values in (("share", wanted > other), ("p", wanted)):
                made = interval(values.astype(float), groups=groups, level=level, seed=seed)
                alike = made.low == made.high
                for end, x in zip(("", "_low", "_high"), np.clip(made[:3], 0, 1)):
                    found[f"{what}{end}"][k, s] = np.nan if alike and end else x
    variables: dict[str, Any] = {name: (("kind", "state"), x) for name, x in found.items()}
    return dataset(
        variables | {"n": (("kind",), units), "prompts": (("kind",), prompts)},
        method="editing.fact_scores",
        provenance=json.loads(result.attrs["provenance"]),
        settings=json.loads(result.attrs["settings"]) | {"level": level},
        seed=seed,
        coords={"kind": list(KINDS), "state": states},
        unit="fact" if facts > 1 else "prompt",
    )


def _prompts(fact: Fact) -> list[tuple[str, Text]]:
    """Every prompt of a fact, with why it is asked; the fact itself first."""
    prompts: list[tuple[str, Text]] = [("rewrite", _facts.spoken(fact))]
    for kind, field in zip(KINDS[1:], ("paraphrases", "neighbours")):
        given = fact.get(field)
        if given is not None and (isinstance(given, str) or not len(given)):
            raise InputError(
                f"{field}={given!r} of {_facts.spoken(fact)!r}: give a list of prompts, one at "
                f"least, or leave {field} out, and {'no ' + kind} is asked."
            )
        prompts += [(kind, text) for text in given or ()]
    return prompts


def _targets(lm: LM, fact: Fact, text: Text) -> tuple[list[int], list[int]]:
    names = ("target_new", "target_true")
    new, true = (_facts.following(lm, text, fact[name], name) for name in names)
    if new == true:
        raise InputError(
            f"target_new and target_true of {text!r:.80} are the same tokens, {new}: neither can "
            "be the likelier."
        )
    return new, true


def _log_probabilities(
    lm: LM, rows: Sequence[list[int]], pairs: Sequence[tuple[list[int], list[int]]]
) -> Float[Tensor, "prompt target"]:
    """The mean over each target's tokens of ln p, given the prompt and the tokens before."""
    found = []
    for begin in range(0, len(rows), _TOGETHER):
        part = slice(begin, begin + _TOGETHER)
        batch = lm.batch(rows[part])
        sides = ([Whole(pair[side]) for pair in pairs[part]] for side in (0, 1))
        longer = continued(lm, batch, sequence.target(lm, batch, *sides))
        each = last_logits(lm, longer.batch).float().log_softmax(dim=-1)
        chosen = each.gather(1, longer.following.to(each.device))
        counts = longer.counts.to(each.device)
        # a token of probability 0 that is not of this target would make 0 * inf
        sums = longer.summed(torch.where(counts > 0, chosen, 0.0).T)
        found.append((sums / longer.summed(counts.T)).T.cpu())
    return torch.cat(found)


def _padded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    width = max(map(len, rows))
    return [[*row, *[""] * (width - len(row))] for row in rows]
