"""State-space sites: what they hold, by plain hooks and by hand; what edits of them do; and that a
wrong table is found out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from stratoscope.engine.intervene import ablate, intervene, replaced, resolve
from stratoscope.engine.memory import predicted
from stratoscope.engine.trace import capture
from stratoscope.errors import FamilyError, InputError, SiteError
from stratoscope.models import wrap
from stratoscope.models.family import out_of
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from stratoscope.models.ssm import scan
from support import tiny, zoo

NAMES = ("mamba", "falcon_mamba", "mamba2")
SCAN = "the recurrence of ssm.in and ssm.gate == ssm.z"


@cache
def grouped() -> LM:
    """Mamba-2 whose heads share B and C in two groups, with steps that are cut off."""
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, num_heads=8, head_dim=8, state_size=4,
        n_groups=2, chunk_size=4, time_step_limit=(0.02, 0.5), pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.weight.mul_(20)
            layer.mixer.D.normal_()
    return wrap(model)


def subject(name: str) -> LM:
    return grouped() if name == "grouped" else zoo.lm(name)


def mixer(lm: LM, layer: int = 0) -> Any:
    return lm.model.backbone.layers[layer].mixer


@pytest.mark.parametrize("name", [*NAMES, "grouped"])
def test_the_recurrence_holds_in_every_layer(name: str) -> None:
    lm = subject(name)
    found = checks(lm, zoo.prompts())
    assert [c for c in found if not c.holds] == []
    assert [c.place for c in found if c.name == SCAN] == [f"layers.{n}.ssm.z" for n in (0, 1)]
    assert max(c.absolute for c in found if c.name == SCAN) < 1e-5
    assert sum(c.name == "W(ssm.z) == mix.out" for c in found) == 2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sites_are_what_plain_hooks_see(name: str) -> None:
    lm, seen = zoo.lm(name), {}
    part = mixer(lm)
    hooks = [
        part.in_proj.register_forward_hook(lambda m, x, out: seen.update(made=out)),
        part.out_proj.register_forward_pre_hook(lambda m, x: seen.update(z=x[0])),
    ]
    lm.model(torch.tensor(zoo.prompts()[:1]), use_cache=False)
    for hook in hooks:
        hook.remove()
    points = ["in", "gate", "z", *(["delta"] if name == "mamba2" else [])]
    ours = capture(lm, zoo.prompts()[:1], *(f"layers.0.ssm.{p}" for p in points))
    inner = lm.dims.channels
    assert inner == part.intermediate_size
    first, second = seen["made"][..., :inner], seen["made"][..., inner : 2 * inner]
    given, gate = (second, first) if name == "mamba2" else (first, second)
    assert torch.equal(ours["layers.0.ssm.in"], given)
    assert torch.equal(ours["layers.0.ssm.gate"], gate)
    assert torch.equal(ours["layers.0.ssm.z"], seen["z"])
    if name == "mamba2":
        assert torch.equal(ours["layers.0.ssm.delta"], seen["made"][..., -part.num_heads :])
    weight = lm.weight("layers.0.mix.out")
    out = capture(lm, zoo.prompts()[:1], "layers.0.mix.out")["layers.0.mix.out"]
    assert tiny.gap(seen["z"] @ weight.T, out) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_acts_at_its_own_position_and_an_input_at_later_ones(name: str) -> None:
    lm, given = zoo.lm(name), zoo.prompts()[:1]
    site = "layers.0.ssm.z"
    before = capture(lm, given, site)[site][0]
    with intervene(lm, replaced("layers.0.ssm.gate", torch.tensor(-100.0), positions=[4])):
        shut = capture(lm, given, site)[site][0]
    assert float(shut[4].abs().max()) < 1e-5 < float(before[4].abs().max())
    assert torch.equal(shut[[0, 1, 2, 3, 5, 6, 7, 8]], before[[0, 1, 2, 3, 5, 6, 7, 8]])
    with intervene(lm, ablate("layers.0.ssm.in", positions=[4])):
        moved = capture(lm, given, site)[site][0]
    assert torch.equal(moved[:4], before[:4])
    assert all(float((moved[n] - before[n]).abs().max()) > 1e-6 for n in range(4, 9))


def test_a_head_without_steps_neither_forgets_nor_writes() -> None:
    """Closed form: with delta at 0 from position 1 on, what a head holds stays as it was."""
    lm, given = zoo.lm("mamba2"), zoo.prompts()[:1]
    part, never = mixer(lm), torch.tensor(-100.0)
    with intervene(lm, replaced("layers.0.ssm.delta", never, units=[2])):
        z = capture(lm, given, "layers.0.ssm.z", "layers.0.ssm.gate", "layers.0.ssm.in")
    gate, x = z["layers.0.ssm.gate"][0], z["layers.0.ssm.in"][0]
    taps = part.conv1d.weight.squeeze(1)[:64]
    before = torch.cat([torch.zeros(3, 64), x])
    conv = sum(before[k : k + 9] * taps[:, k] for k in range(4)) + part.conv1d.bias[:64]
    y = torch.nn.functional.silu(conv).unflatten(-1, (8, 8)) * part.D[:, None]
    own = slice(16, 24)  # head 2 writes D x alone, before the norm that all heads share
    raw = (y.flatten(1) * torch.nn.functional.silu(gate))[:, own]
    said = z["layers.0.ssm.z"][0][:, own] / part.norm.weight[own]
    ratio = (said * raw).sum(-1) / raw.square().sum(-1)
    assert tiny.gap(said, ratio[:, None] * raw) < 1e-5


def test_scan_is_a_sum_over_earlier_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(1, 6, 3, 2, generator=generator), torch.rand(1, 6, 3) + 0.1
    a, b, c = -torch.rand(3, 4) - 0.1, torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 4)
    d = torch.randn(3)
    expected = torch.zeros(1, 6, 3, 2)
    for t in range(6):
        for s in range(t + 1):
            stayed = torch.exp(delta[0, s + 1 : t + 1].sum(0)[:, None] * a)  # head, state
            read = (c[0, t] * stayed * b[0, s]).sum(-1)  # head
            expected[0, t] += (read * delta[0, s])[:, None] * x[0, s]
        expected[0, t] += d[:, None] * x[0, t]
    assert tiny.gap(scan(x, delta, a, b, c, d), expected) < 1e-5


def holds(lm: LM) -> bool:
    try:
        prove(lm, zoo.prompts())
    except (FamilyError, RuntimeError):  # a site of another width may not even have the shape
        return False
    return True


@pytest.mark.parametrize("name", [*NAMES, "grouped"])
def test_a_wrong_table_is_found_out(name: str) -> None:
    lm = subject(name)
    tower = lm.family.towers[""]
    points = tower.points
    faults = {
        "swapped": {"ssm.in": points["ssm.gate"], "ssm.gate": points["ssm.in"]},
        "what is written": {"ssm.z": out_of("mixer.out_proj")},
    }
    if name in ("mamba2", "grouped"):
        start, stop = points["ssm.delta"].columns
        shifted = replace(points["ssm.delta"], columns=(start - 1, stop - 1))
        faults["one column off"] = {"ssm.delta": shifted}
    else:
        faults["after the convolution"] = {"ssm.in": replace(points["ssm.z"], path="mixer.x_proj")}
    for fault, wrong in faults.items():
        spoilt = LM(lm.model, replace(lm.family, towers={"": tower.but(points=wrong)}))
        assert not holds(spoilt), f"{fault} passed"


def test_what_is_not_there_is_refused_and_memory_is_counted() -> None:
    lm = zoo.lm("mamba")
    with pytest.raises(SiteError, match=r"inside the scan"):
        lm.sites("layers.0.ssm.delta")
    with pytest.raises(SiteError, match=r"MambaMixer, not attention; read `ssm.z`"):
        lm.sites("layers.*.attn.z")
    with pytest.raises(SiteError, match=r"no file .* names the inside of this layer's mixer"):
        zoo.lm("bamba").sites("layers.0.ssm.z")
    batch, site = lm.batch(zoo.prompts()), lm.sites("layers.0.ssm.z")
    assert predicted(lm, site, batch) == 2 * 9 * lm.dims.channels * 4
    lm = zoo.lm("mamba2")
    assert predicted(lm, lm.sites("layers.0.ssm.delta"), lm.batch(zoo.prompts())) == 2 * 9 * 8 * 4
    with pytest.raises(InputError, match="this site has 8"):
        resolve(lm, [ablate("layers.0.ssm.delta", units=[8])])
