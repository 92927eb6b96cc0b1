"""How well a model does a task: to be known before anything about how it does it is explained."""

from __future__ import annotations

import torch
import xarray as xr
from scipy.stats import binomtest

from stratoscope.engine.metric import last_logits, target
from stratoscope.errors import InputError
from stratoscope.lab.tasks._task import Task
from stratoscope.models.lm import LM
from stratoscope.results import dataset


@torch.no_grad()
def accuracy(lm: LM, task: Task, *, batch: int = 16) -> xr.Dataset:
    """Share of examples where logit(answer) > logit(foil), against chance, and what lies behind it.

    Variables, shares without axes: accuracy, with its 95 % Wilson interval accuracy_low to
    accuracy_high; chance; top_accuracy, where the answer is the top token of the whole vocabulary;
    shift_accuracy, where the difference logit(answer) - logit(foil) is higher after the clean
    prompt than after the corrupt one: chance is 0.5 there, also for a model that always prefers one
    kind of answer. By example: correct, top, clean_difference, corrupt_difference.

    batch: prompts in one forward pass. Raises InputError when it is below 1.
    """
    if batch < 1:
        raise InputError(f"batch={batch}: at least one prompt goes through the model at a time.")
    differences, tops = [], []
    for prompts in (task.clean, task.corrupt):
        for start in range(0, len(task), batch):
            part = slice(start, start + batch)
            inputs = lm.batch(list(prompts[part]))
            logits = last_logits(lm, inputs)
            wanted = target(lm, inputs, list(task.answer_ids[part]), list(task.foil_ids[part]))
            differences.append(wanted.difference(logits).float().cpu())
            tops.append(logits.argmax(dim=-1).cpu() == wanted.answer)
    clean, corrupt = torch.cat(differences).chunk(2)
    top, _ = torch.cat(tops).chunk(2)
    correct = clean > 0
    interval = binomtest(int(correct.sum()), len(task)).proportion_ci(method="wilson")
    shares = {
        "accuracy": correct.double().mean(),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "chance": task.chance,
        "top_accuracy": top.double().mean(),
        "shift_accuracy": (clean > corrupt).double().mean(),
    }
    by_example = {
        "correct": correct,
        "top": top,
        "clean_difference": clean,
        "corrupt_difference": corrupt,
    }
    return dataset(
        {name: ((), value) for name, value in shares.items()}
        | {name: (("example",), value) for name, value in by_example.items()},
        method="lab.tasks.accuracy",
        provenance=lm.provenance,
        settings={"task": task.name, "n": len(task)},
        coords={
            "answer": (("example",), list(task.answers)),
            "foil": (("example",), list(task.foils)),
        },
        story=task.story,
        source=task.source,
    )
