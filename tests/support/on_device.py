"""What is run once on the CPU and once on another device, pretended or real: every measure of the
catalogue, circuits of few edges, changes of every kind, edits, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import transformers as hf
import xarray as xr
from torch import Tensor

from stratoscope import catalogue
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import (
    ablate,
    add,
    clamped,
    intervene,
    knock_out,
    project_out,
    replaced,
)
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import trace
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from support import cases, tiny
from support.cases import Case
from support.circuits import CLEAN, CORRUPT

METHODS = {
    verb: [e.address for e in catalogue.methods() if verb in e.verbs]
    for verb in ("measure", "edit")
}
MEASURES = [address for address in METHODS["measure"] if not address.startswith("circuits.")]
EDITS = METHODS["edit"]

# fewer edges, steps and draws than by default: those are hundreds of passes
CIRCUITS: dict[str, dict[str, Any]] = {
    "path_patching": {"paths": [("L0H1", "L1H2.k"), (["embed", "L0 mlp"], ["L1 mlp", "logits"])]},
    "edge_attribution": {},
    "edge_attribution_ig": {"steps": 1},
    "faithfulness": {
        "circuit": [("L0H1", "L1H2.k"), ("L1H2", "logits")],
        "ablation": "mean",
        "draws": 1,
    },
    "output_nodes": {"nodes": 2, "draws": 1},
}
# the bound of chance asks which examples have a place: pictures bring no mask
PICTURES = [
    (f"{room}.activation_patching", name)
    for room in ("heads", "layers")
    for name in ("vit", "llava")
]
CHANGES = {
    "replaced": replaced("layers.1.resid_post", torch.ones(1, 1, 1), positions=[0, -1]),
    "added": add("layers.0.mlp.out", torch.ones(1, 1, 1), examples=[1], positions=-1),
    "clamped": clamped("layers.1.mlp.act", 0.0, 0.1, units=[1, 2]),
    "projected": project_out("layers.1.resid_mid", torch.eye(32)[:2]),
    "knocked out": knock_out(1, -1, 0, heads=[1]),
    "resampled": ablate(
        "layers.1.attn.z", "resample", reference=torch.ones(2, 6, 1, 8), lengths=[6, 3], units=[0]
    ),
}

Result = xr.Dataset | list[Tensor]


@dataclass(frozen=True)
class Work:
    """Something to run on a subject of the contract suite, given the model on some device."""

    name: str
    subject: str
    run: Callable[[LM], Result]


def moved(lm: LM, device: str | torch.device = "cpu") -> LM:
    """The same model once more, on a device; the first stays where it is."""
    return wrap(deepcopy(lm.model).to(device), lm.tokenizer)


class Longer(Case):
    """The prompts of a case, half as long again."""

    @cached_property
    def rows(self) -> list[list[int]]:
        return [[*row, *row[-(len(row) // 2 + 1) :]] for row in super().rows]


@cache
def larger(name: str) -> Case:
    """More positions and, of a Llama, twice as many heads on as many layers: more cells."""
    if name != "llama":
        return Longer(name, moved(cases.subject(name)))
    config = hf.LlamaConfig(**tiny.GROUPED | {"num_attention_heads": 8, "num_key_value_heads": 4})
    torch.manual_seed(0)
    return Longer(name, wrap(hf.LlamaForCausalLM(config).eval()))


def circuit(lm: LM, method: str) -> xr.Dataset:
    ask = {"corrupt": CORRUPT[1:], "answer": 5, "foil": 9}
    return catalogue.module(f"circuits.{method}").measure(lm, CLEAN[1:], **ask, **CIRCUITS[method])


def changed(lm: LM, kind: str) -> list[Tensor]:
    """What a change makes of a metric, packed and singly, and of what is generated under it."""
    change = CHANGES[kind]
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]
    metric = lambda logits, example: logits[:, 5] - logits[:, 9]  # noqa: E731
    results = [run(lm, prompts, [change], metric) for run in (sweep, naive)]
    if kind != "resampled":  # what is generated is longer than the reference
        sites = ("layers.1.attn.pattern", "layers.1.resid_post")
        with trace(lm, *sites, stop=False) as seen, intervene(lm, change):
            results += generate(lm, prompts, tokens=2)
        results += [step for site in sites for step in seen.steps(site)]
    return results


def edited(lm: LM, address: str) -> list[Tensor]:
    """The logits inside an edit, and outside."""
    case = Case("llama", lm, "left")
    with cases.call(address, "edit", case):
        inside = lm(case.inputs)["logits"]
    return [inside, lm(case.inputs)["logits"]]


def explained(lm: LM) -> xr.Dataset:
    """The numbers of the whole report, but those of its circuit."""
    from stratoscope.report.explain import explain

    truth = planted.induction()
    made = explain(lm, truth.clean, corrupt=truth.corrupt, answer=truth.answer, foil=truth.foil)
    assert set(made.missing) <= {"circuits.discover"}, made.missing
    arrays = {
        f"{step} {name}": values.drop_vars(list(values.coords)).rename(
            {axis: f"{step} {axis}" for axis in values.dims}
        )
        for step, result in made.results.items()
        for name, values in (
            result.data_vars if isinstance(result, xr.Dataset) else {"": result}
        ).items()
    }
    return xr.Dataset(arrays)


def everything(every: bool = False) -> Iterator[Work]:
    """All of it. every: each measure on every subject that it runs on, not on the first."""
    for address in MEASURES:
        for name in _subjects(address, every):
            yield Work(address, name, lambda lm, a=address, n=name: cases.measure(a, Case(n, lm)))
    for address, name in () if every else PICTURES:
        title = f"{address} of {name}"
        yield Work(title, name, lambda lm, a=address, n=name: cases.measure(a, Case(n, lm)))
    for method in CIRCUITS:
        yield Work(f"circuits.{method}", "gemma2", lambda lm, m=method: circuit(lm, m))
    for address in EDITS:
        yield Work(f"{address}, an edit", "llama", lambda lm, a=address: edited(lm, a))
    for kind in CHANGES:
        yield Work(f"sweep and naive, {kind}", "llama", lambda lm, k=kind: changed(lm, k))
    yield Work("report.explain", "planted", explained)
    for name in tiny.CONFIGS:  # `moved` wraps it there, and so proves its family
        yield Work("wrap and run", name, lambda lm, n=name: outputs(lm, n))


def outputs(lm: LM, name: str) -> list[Tensor]:
    return [next(x for x in lm(tiny.inputs(name)).values() if isinstance(x, Tensor))]


def _subjects(address: str, every: bool) -> list[str]:
    try:
        if every:
            return [n for n in cases.DEFAULT if cases.attempt(address, "measure", n) is not None]
        return [cases.runs_on(address) or "llama"]
    except Exception:  # it breaks on the CPU already: who runs it sees it
        return ["llama"]
