"""Every method gives on an accelerator what it gives on the CPU, mixes no devices on the way, and
does not make the host wait for each cell: on a pretended one."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
import xarray as xr

from stratoscope.models import LM, wrap
from support import cases, on_device, pretend, tiny
from support.cases import Case
from support.compare import differences
from support.on_device import CHANGES, CIRCUITS, EDITS, MEASURES, PICTURES

pytestmark = pytest.mark.usefixtures("without_type_checks")


@cache
def subject(name: str) -> LM:
    """A model of its own: it is moved."""
    return on_device.moved(cases.subject(name))


@cache
def measured(address: str, size: str) -> tuple[xr.Dataset, Counter[str]]:
    """What a measure gives there of a small or a large case, and how often each line of ours makes
    the host wait for it."""
    name = cases.runs_on(address) or "llama"
    case = Case(name, subject(name)) if size == "small" else on_device.larger(name)
    with pretend.device(case.lm.model), pretend.waits() as counts:
        return cases.measure(address, case), counts


@pytest.mark.parametrize("address", MEASURES)
def test_a_measure_mixes_no_devices_and_gives_the_same_numbers(address: str) -> None:
    here = cases.supported(address, "measure", cases.runs_on(address) or "llama")
    assert differences(here, measured(address, "small")[0]) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "modernbert", "qwen2_5_vl"])
def test_a_model_is_proved_on_the_device_that_it_is_on(name: str) -> None:
    model = tiny.model(name)
    with pretend.device(model):
        there = on_device.outputs(wrap(model), name)
    here = on_device.outputs(cases.subject(name), name)
    assert all(x.device.type == "cuda" for x in there)
    assert all(torch.allclose(x, pretend.plain(y), atol=1e-5) for x, y in zip(here, there))


@pytest.mark.parametrize("address", MEASURES)
def test_a_measure_of_more_cells_waits_for_the_device_no_oftener(address: str) -> None:
    """Half as many positions more, and twice as many heads: a wait for each would be counted."""
    cases.supported(address, "measure", cases.runs_on(address) or "llama")
    small, large = (measured(address, size)[1] for size in ("small", "large"))
    more = {line: n - small[line] for line, n in large.items() if n > small[line]}
    assert not more
    assert sum(small.values()) > 0  # results are on the host in the end


@pytest.mark.parametrize("method", CIRCUITS)
def test_circuits_mix_no_devices_and_give_the_same_numbers(method: str) -> None:
    """On a model with grouped queries, post-norms and a soft-cap."""
    lm = subject("gemma2")
    here = on_device.circuit(lm, method)
    with pretend.device(lm.model):
        there = on_device.circuit(lm, method)
    assert differences(here, there) == []


@pytest.mark.parametrize(("address", "name"), PICTURES)
def test_patching_with_a_picture_and_no_mask_mixes_no_devices(address: str, name: str) -> None:
    here, lm = cases.supported(address, "measure", name), subject(name)
    with pretend.device(lm.model):
        there = cases.measure(address, Case(name, lm))
    assert differences(here, there) == []


@pytest.mark.parametrize("address", EDITS)
def test_an_edit_mixes_no_devices_and_changes_the_same(address: str) -> None:
    lm = subject("llama")
    here, plain = on_device.edited(lm, address)
    with pretend.device(lm.model):
        there, _ = on_device.edited(lm, address)
    assert there.device.type == "cuda"
    assert torch.allclose(here, pretend.plain(there), atol=1e-5)
    assert not torch.equal(here, plain)


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_made_singly_packed_and_while_generating_mix_no_devices(kind: str) -> None:
    lm = subject("llama")
    here = on_device.changed(lm, kind)
    with pretend.device(lm.model):
        there = on_device.changed(lm, kind)
    for one, two in zip(here, there):
        assert torch.allclose(one.float(), pretend.plain(two).float(), atol=1e-5, equal_nan=True)


def test_the_whole_report_mixes_no_devices_and_has_the_same_numbers() -> None:
    lm = subject("planted")
    here = on_device.explained(lm)
    with pretend.device(lm.model):
        there = on_device.explained(lm)
    assert differences(here, there) == []


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    x, here = pretend.there(torch.ones(3)), torch.ones(3)
    for mixed in (
        lambda: x + here,
        lambda: torch.stack([x, here]),
        lambda: torch.where(x > 0, here, here),
        lambda: here[x > 0],
        lambda: here.index_put((torch.tensor([0, 1]),), x[:2]),
        lambda: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda: torch.bernoulli(x / 2, generator=torch.Generator()),
        lambda: here * x[0],  # a scalar of the device with a vector of the CPU
        lambda: torch.stack([x[0], torch.tensor(1.0)]),
        lambda: x.index_select(0, torch.tensor(1)),
        lambda: x.long() @ x.long(),
    ):
        with pretend.device(), pytest.raises(RuntimeError, match=r"device|indices|cuda"):
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


def test_waits_are_counted_where_stratoscope_waits() -> None:
    from stratoscope.models import finite

    x = pretend.there(torch.ones(3))
    with pretend.device(), pretend.waits() as counts:
        x.tolist()  # a test's own
        torch.nn.functional.softmax(x, dim=0).sum().item()
        assert counts == {}
        for _ in range(2):
            finite.refuse({"a value": x})
    assert sorted(counts.values()) == [2]
    assert next(iter(counts)).startswith("models/finite.py:")
