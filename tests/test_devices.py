"""Every method gives on an accelerator what it gives on the CPU, and mixes no devices on the way:
on a pretended one."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch

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
from stratoscope.models import LM, wrap
from support import cases, pretend
from support.cases import Case
from support.circuits import CLEAN, CORRUPT
from support.compare import differences

pytestmark = pytest.mark.usefixtures("without_type_checks")
MEASURES = [e.address for e in catalogue.methods() if "measure" in e.verbs]
EDITS = [e.address for e in catalogue.methods() if "edit" in e.verbs]


@cache
def subject(name: str) -> LM:
    """A model of its own: it is moved."""
    return wrap(deepcopy(cases.subject(name).model), cases.subject(name).tokenizer)


@pytest.mark.parametrize("address", [a for a in MEASURES if not a.startswith("circuits.")])
def test_a_measure_mixes_no_devices_and_gives_the_same_numbers(address: str) -> None:
    name = cases.runs_on(address) or "llama"
    here, lm = cases.supported(address, "measure", name), subject(name)
    with pretend.device(lm.model):
        there = cases.measure(address, Case(name, lm))
    assert differences(here, there) == []


# fewer edges, steps and draws than by default: those are hundreds of passes
CIRCUITS = {
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


@pytest.mark.parametrize("method", CIRCUITS)
def test_circuits_mix_no_devices_and_give_the_same_numbers(method: str) -> None:
    """On a model with grouped queries, post-norms and a soft-cap."""
    lm, asked = subject("gemma2"), {"corrupt": CORRUPT[1:], "answer": 5, "foil": 9}
    run = catalogue.module(f"circuits.{method}").measure
    here = run(lm, CLEAN[1:], **asked, **CIRCUITS[method])
    with pretend.device(lm.model):
        there = run(lm, CLEAN[1:], **asked, **CIRCUITS[method])
    assert differences(here, there) == []


@pytest.mark.parametrize("name", ["vit", "llava"])
@pytest.mark.parametrize("room", ["heads", "layers"])
def test_patching_with_a_picture_and_no_mask_mixes_no_devices(room: str, name: str) -> None:
    """The bound of chance asks which examples have a place: pictures bring no mask."""
    address = f"{room}.activation_patching"
    here, lm = cases.supported(address, "measure", name), subject(name)
    with pretend.device(lm.model):
        there = cases.measure(address, Case(name, lm))
    assert differences(here, there) == []


@pytest.mark.parametrize("address", EDITS)
def test_an_edit_mixes_no_devices_and_changes_the_same(address: str) -> None:
    case = Case("llama", subject("llama"), "left")

    def logits() -> torch.Tensor:
        with cases.call(address, "edit", case):
            return case.lm(case.inputs)["logits"]

    plain, here = case.lm(case.inputs)["logits"], logits()
    with pretend.device(case.lm.model):
        there = logits()
    assert there.device.type == "cuda"
    assert torch.allclose(here, pretend.plain(there), atol=1e-5)
    assert not torch.equal(here, plain)


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


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_made_singly_packed_and_while_generating_mix_no_devices(kind: str) -> None:
    lm, change, prompts = subject("llama"), CHANGES[kind], [[3, 4, 5, 6, 7, 8], [9, 10, 11]]

    def everything() -> list[torch.Tensor]:
        metric = lambda logits, example: logits[:, 5] - logits[:, 9]  # noqa: E731
        found = [run(lm, prompts, [change], metric) for run in (sweep, naive)]
        if kind != "resampled":
            with (
                trace(lm, "layers.1.attn.pattern", "layers.1.resid_post", stop=False) as seen,
                intervene(lm, change),
            ):
                found += generate(lm, prompts, tokens=2)
            found += [*seen.steps("layers.1.attn.pattern"), *seen.steps("layers.1.resid_post")]
        return found

    here = everything()
    with pretend.device(lm.model):
        there = everything()
    for one, two in zip(here, there):
        assert torch.allclose(one.float(), pretend.plain(two).float(), atol=1e-5, equal_nan=True)


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    x, here = pretend.there(torch.ones(3)), torch.ones(3)
    for mixed in (
        lambda: x + here,
        lambda: torch.stack([x, here]),
        lambda: torch.where(x > 0, here, here),
        lambda: here[x > 0],
        lambda: here.index_put((torch.tensor([0, 1]),), x[:2]),
        lambda: torch.randn(3, device=x.device, generator=torch.Generator()),
    ):
        with pretend.device(), pytest.raises(RuntimeError, match=r"device|indices"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pretend.device():
        made = (
            x[torch.tensor([0])],
            here.to(x),
            torch.zeros_like(x),
            torch.arange(3, device=x.device),
            x * 2,
            -x,
        )
        assert {
            t.device.type for t in (*made, x.new_ones(2), x * torch.tensor(2.0), x.double())
        } == {"cuda"}
        assert {
            t.device.type for t in (x.cpu(), x.to("cpu"), here, torch.arange(3), x.to(here))
        } == {"cpu"}
