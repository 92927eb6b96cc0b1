"""The laws of `build`, `batch` with `loss`, `search` and `items`: what is broken, a line each.

Functions here take what a method offers, so that they hold it to the law before the first method
of its kind is written; `tests/test_laws.py` runs each on an example that passes and on broken ones.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stratoscope.errors import FamilyError
from stratoscope.models import wrap
from support.laws import Faults

Given = list[int] | dict[str, Tensor]  # one example: ids, or whatever the model takes
CLOSE = 1e-5
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
import stratoscope
lm = stratoscope.load(sys.argv[1], tokenizer=False)
with torch.no_grad():
    logits = lm.model(**load_file(sys.argv[2])).logits
state = {f"state/{k}": x.clone().contiguous() for k, x in lm.model.state_dict().items()}
save_file({"logits": logits.contiguous()} | state, sys.argv[3])
"""


# --- build ----------------------------------------------------------------------------------------


def built(model: Any, examples: Sequence[Given], parameters: int) -> Faults:
    """A built model is a `PreTrainedModel` of the stated size that wraps and so is proved; batched
    equals single, padded or not; every parameter has a gradient.

    examples: two or more; ids of different length. parameters: how many numbers it is said to have.
    """
    if not isinstance(model, PreTrainedModel):
        return [f"it is a {type(model).__name__}, not a PreTrainedModel"]
    count = sum(p.numel() for p in model.parameters())
    faults = [] if count == parameters else [f"{count} parameters, not {parameters}"]
    try:
        lm = wrap(model)
    except FamilyError as error:
        return [*faults, f"it is not proved: {error}"]
    with torch.no_grad():
        together = lm(_joined(examples))["logits"]
        for number, one in enumerate(examples):
            single = lm(_joined([one]))["logits"]
            gap = (together[number : number + 1, : single.shape[1]] - single).abs().max()
            if float(gap) > CLOSE * float(single.abs().max().clamp_min(1)):
                faults.append(f"example {number} alone is another: {float(gap):.1e}")
    return faults + ungrown(model, examples)


def _joined(examples: Sequence[Given]) -> Any:
    if isinstance(examples[0], dict):
        return {key: torch.cat([one[key] for one in examples]) for key in examples[0]}
    return [list(one) for one in examples]


def _arguments(one: Given) -> dict[str, Tensor]:
    return one if isinstance(one, dict) else {"input_ids": torch.tensor([one])}


def ungrown(model: nn.Module, examples: Sequence[Given]) -> Faults:
    """The parameters that no gradient reaches."""
    model.zero_grad()
    for one in examples:
        logits = model(**_arguments(one)).logits
        weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape).sin()
        (logits * weight).sum().backward()
    missed = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    return [f"no gradient reaches {name}" for name in missed]


def reopened(model: PreTrainedModel, one: Given, folder: Path) -> Faults:
    """The model's folder, opened by `stratoscope.load` in a fresh process, has the same weights and
    buffers bit for bit, and gives the same logits but for the last bit, which depends on where in
    memory a weight lies."""
    model.save_pretrained(folder / "model")
    given, out = folder / "given.safetensors", folder / "logits.safetensors"
    save_file({key: x.contiguous() for key, x in _arguments(one).items()}, given)
    command = [sys.executable, "-c", FRESH, str(folder / "model"), str(given), str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return [f"a fresh process does not open it: {run.stderr.strip()[-300:]}"]
    with torch.no_grad():
        here = model.eval()(**_arguments(one)).logits
    there, state = load_file(out), model.state_dict()
    kept = {k.removeprefix("state/"): x for k, x in there.items() if k != "logits"}
    if state.keys() != kept.keys() or not all(torch.equal(state[k], kept[k]) for k in state):
        return ["a fresh process has other weights"]
    close = torch.allclose(here, there["logits"], rtol=1e-6, atol=1e-6)
    return [] if close else ["a fresh process gives other logits"]


# --- batch and loss -------------------------------------------------------------------------------


def objective(
    batch: Callable[..., dict[str, Tensor]],
    loss: Callable[..., dict[str, Tensor]],
    model: nn.Module,
    rows: Sequence[Any],
    *,
    tokenizer: Any = None,
    other: Callable[[Tensor], Tensor],
) -> Faults:
    """The same generator gives the same batch and loss; what is asked is not shown, so that another
    target changes the loss alone; padding takes no part.

    other: labels -> labels of which at least one that counts is another.
    """

    def drawn(rows: Sequence[Any]) -> dict[str, Tensor]:
        return batch(rows, tokenizer, torch.Generator().manual_seed(0))

    one, two = drawn(rows), drawn(rows)
    if one.keys() != two.keys() or not all(torch.equal(one[k], two[k]) for k in one):
        return ["the same generator gives another batch"]
    first, again = loss(model, one), loss(model, two)
    faults = [f"the same batch, another {k}" for k in first if not torch.equal(first[k], again[k])]
    faults += [f"{k} is no scalar" for k in first if first[k].ndim]
    if not {"loss", "targets"} <= first.keys():
        return [*faults, f"it says {sorted(first)}: loss and targets are missing"]
    asked = one | {"labels": other(one["labels"])}
    given, changed = shown(loss, model, one), shown(loss, model, asked)
    if len(given) != len(changed) or any(a.keys() != b.keys() for a, b in zip(given, changed)):
        faults.append("a changed target changes what is run")
    else:
        pairs = [(k, a[k], b[k]) for a, b in zip(given, changed) for k in a]
        faults += [
            f"the target leaks into {k}"
            for k, x, y in pairs
            if isinstance(x, Tensor) and not torch.equal(x, y)
        ]
    if torch.equal(loss(model, asked)["loss"], first["loss"]):
        faults.append("a changed target does not change the loss")
    singles = [loss(model, drawn([row])) for row in rows]
    counts = torch.stack([single["targets"] for single in singles]).double()
    alone = torch.stack([single["loss"].detach() for single in singles]).double()
    mean = float((alone * counts).sum() / counts.sum())
    gap = abs(mean - float(first["loss"].detach()))
    return faults + ([f"padding takes part: {gap:.1e}"] if gap > CLOSE * max(1.0, mean) else [])


def shown(
    loss: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The arguments of each forward pass of `loss`."""
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({**{str(n): x for n, x in enumerate(args)}, **kwargs})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        loss(model, batch)
    finally:
        hook.remove()
    return seen


# --- search ---------------------------------------------------------------------------------------


def searched(
    search: Callable[[Any, int, int], tuple[Tensor, Tensor]],
    scores: Callable[[Any], Tensor],
    queries: Sequence[Any],
    budgets: Sequence[int],
    k: int = 5,
) -> Faults:
    """With the whole budget, `search(query, k, budget)` gives the ids and scores of an exhaustive
    search; recall grows with the budget.

    scores: query -> the exact score of every document. budgets: rising; the last is the whole.
    """
    faults, recall = [], []
    for budget in budgets:
        hits = []
        for number, query in enumerate(queries):
            best = scores(query).topk(k)
            ids, said = search(query, k, budget)
            hits.append(len({*ids.tolist()} & {*best.indices.tolist()}) / k)
            if budget != budgets[-1]:
                continue
            if ids.tolist() != best.indices.tolist():
                faults.append(f"query {number}: {ids.tolist()}, not {best.indices.tolist()}")
            elif not torch.allclose(said, best.values, rtol=CLOSE, atol=CLOSE):
                faults.append(f"query {number}: scores {said.tolist()}")
        recall.append(sum(hits) / len(hits))
    if any(later < earlier for earlier, later in pairwise(recall)):
        faults.append(f"recall falls as the budget grows: {recall}")
    return faults


# --- items ----------------------------------------------------------------------------------------


def asked(
    items: Callable[..., Sequence[Any]],
    right: Callable[[Sequence[Any], Sequence[int]], float],
    *,
    chance: float,
    tolerance: float = 0.02,
) -> Faults:
    """The same seed gives the same items and another seed others; an oracle has 1, each constant
    answer the chance that is stated; no item is in both train and test.

    items: `items(seed=, split=)`, which gives `benchmarks.Item`. right: the share that is right.
    """
    test, again = items(seed=0, split="test"), items(seed=0, split="test")
    faults = [] if list(test) == list(again) else ["the same seed, other items"]
    if list(test) == list(items(seed=1, split="test")):
        faults.append("another seed, the same items")
    oracle = right(test, [item.gold for item in test])
    faults += [] if oracle == 1 else [f"an oracle has {oracle}"]
    for choice in range(min(len(item.choices) for item in test)):
        constant = right(test, [choice] * len(test))
        if abs(constant - chance) > tolerance:
            faults.append(f"always {choice} has {constant:.3f}, chance is {chance:.3f}")
    train = {repr((item.context, item.choices)) for item in items(seed=0, split="train")}
    shared = [item for item in test if repr((item.context, item.choices)) in train]
    return faults + ([f"{len(shared)} items are in train and test"] if shared else [])
