"""Every measure inside an outer change gives what it gives on the changed model.

Where a change can be written into the weights (a head's columns zeroed, an MLP's output doubled,
queries made louder), a model with those weights is the reference, for sweeps, edges and plain
measures alike. The others are compared with the same method whose sweep is `naive`, and the
read-out with ordinary hooks on the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
import xarray as xr

from stratoscope.circuits import edge_attribution, faithfulness, output_nodes, path_patching
from stratoscope.engine import edges, sequence
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import Intervention, ablate, add, clamped, intervene, scaled
from stratoscope.engine.sent import sent
from stratoscope.engine.sweep import naive
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import wiring
from stratoscope.errors import SiteError
from stratoscope.heads import activation_patching as heads_patching
from stratoscope.heads import answer_suppression, argument_passing, roles
from stratoscope.layers import (
    activation_patching,
    back_patching,
    direct_logit_attribution,
    logit_lens,
)
from stratoscope.models import wrap
from stratoscope.neurons import contribution
from stratoscope.tokens import next_token, occlusion
from support import tiny
from support.outer import CLEAN, CORRUPT, FAMILIES, OUTER, V

ONE, OTHER = [CLEAN[1]], [CORRUPT[1]]
ASKED: dict[str, Any] = {"answer": 5, "foil": 9}
PAIR = ASKED | {"corrupt": OTHER}
PATHS = [
    ("embed", "L1H0.q"),
    ("L0H1", "L1H3.v"),
    ("L0 mlp", "L1H1.k"),
    ("L1H2", "L2 mlp"),
    ("L1 mlp", "logits"),
]
SWEEPS: dict[str, tuple[ModuleType, Callable[[Any], xr.Dataset]]] = {
    "layers": (activation_patching, lambda lm: activation_patching.measure(lm, ONE, **PAIR)),
    "heads": (heads_patching, lambda lm: heads_patching.measure(lm, ONE, **PAIR)),
    "occlusion": (occlusion, lambda lm: occlusion.measure(lm, CLEAN, **ASKED)),
    "back-patching": (back_patching, lambda lm: back_patching.measure(lm, CLEAN, answer=5)),
    "argument passing": (argument_passing, lambda lm: argument_passing.measure(lm, ONE, **PAIR)),
    "answer suppression": (
        answer_suppression,
        lambda lm: answer_suppression.measure(lm, CLEAN, answer=5),
    ),
    "output nodes": (
        output_nodes,
        lambda lm: output_nodes.measure(lm, ONE, **PAIR, nodes=4, draws=1),
    ),
    "path patching": (edges, lambda lm: path_patching.measure(lm, ONE, **PAIR, paths=PATHS)),
}
MEASURES: dict[str, Callable[[Any], xr.Dataset]] = {
    name: run for name, (_, run) in SWEEPS.items()
} | {
    "faithfulness": lambda lm: faithfulness.measure(lm, ONE, **PAIR, circuit=PATHS[1:], draws=1),
    "edge attribution": lambda lm: edge_attribution.measure(lm, ONE, **PAIR),
    "next token": lambda lm: next_token.measure(lm, CLEAN, **ASKED),
    "logit lens": lambda lm: logit_lens.measure(lm, CLEAN, answer=5),
    "direct attribution": lambda lm: direct_logit_attribution.measure(lm, CLEAN, **ASKED),
    "roles": lambda lm: roles.measure(lm, ONE, **ASKED),
}


def same(got: xr.Dataset, expected: xr.Dataset) -> None:
    assert set(got.data_vars) == set(expected.data_vars)
    for name, x in expected.data_vars.items():
        if x.dtype.kind == "f" and name != "residual_error":
            a, b = (torch.as_tensor(y.values).double() for y in (got[name], x))
            assert torch.equal(a.isnan(), b.isnan()), name
            a, b = a.nan_to_num(), b.nan_to_num()
            assert float((a - b).abs().max()) <= 2e-4 * max(1.0, float(b.abs().max())), name


def _head(model: Any, name: str) -> None:
    if name == "gpt2":
        model.transformer.h[1].attn.c_proj.weight[16:24] = 0
    else:
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0


def _mlp(model: Any, name: str) -> None:
    if name == "gemma2":  # its norm multiplies by one plus the weight
        weight = model.model.layers[1].post_feedforward_layernorm.weight
        weight.copy_(2 * (1 + weight) - 1)
    elif name == "llama":
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    else:
        model.transformer.h[1].mlp.c_proj.weight.mul_(2)
        model.transformer.h[1].mlp.c_proj.bias.mul_(2)


def _queries(model: Any, name: str) -> None:
    if name == "gpt2":
        model.transformer.h[1].attn.c_attn.weight[:, :32] *= 3
        model.transformer.h[1].attn.c_attn.bias[:32] *= 3
    else:
        model.model.layers[1].self_attn.q_proj.weight.mul_(3)


IN_WEIGHTS: dict[str, tuple[Intervention, Callable[[Any, str], None]]] = {
    "a head": (ablate("layers.1.attn.z", units=[2]), _head),
    "an MLP": (scaled("layers.1.mlp.out", 2.0), _mlp),
    "queries": (scaled("layers.1.attn.q", 3.0), _queries),
}


@cache
def changed(name: str, what: str) -> Any:
    model = tiny.model(name)
    with torch.no_grad():
        IN_WEIGHTS[what][1](model, name)
    return wrap(model)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama", "a head"),
        ("gpt2", "a head"),
        ("gpt2", "queries"),
        ("gemma2", "queries"),
        ("gemma2", "an MLP"),
    ],
)
def test_measures_inside_a_change_equal_those_of_a_model_with_other_weights(
    name: str, what: str
) -> None:
    lm = tiny.lm(name)
    for method, measure in MEASURES.items():
        if method == "roles" and what == "a head":
            continue  # roles are of what a head would write, read off its weights
        expected = measure(changed(name, what))
        with intervene(lm, IN_WEIGHTS[what][0]):
            same(measure(lm), expected)


@pytest.mark.parametrize("outer", ["add at the last", "logits", "a hook"])
def test_methods_that_sweep_equal_the_same_by_whole_runs(
    outer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.lm("llama")
    for name, (module, measure) in SWEEPS.items():
        reads_weights = name in ("output nodes", "answer suppression")
        refused = reads_weights if outer == "logits" else name == "path patching"
        if outer != "add at the last" and not refused and name != "layers":
            continue  # all cells run whole: one method shows it
        with OUTER[outer](lm):
            if refused:
                with pytest.raises(SiteError):
                    measure(lm)
                continue
            got = measure(lm)
            with monkeypatch.context() as patched:
                for place in (module, sequence):  # patching and occlusion sweep through the latter
                    if hasattr(place, "sweep"):
                        patched.setattr(
                            place,
                            "sweep",
                            lambda *a, progress=None, save=None, seen=None: naive(*a),
                        )
                same(got, measure(lm))


@pytest.mark.parametrize("name", FAMILIES)
def test_writes_sum_to_what_is_read_inside_outer_changes(name: str) -> None:
    lm, wires = tiny.lm(name), wiring(tiny.lm(name))
    for change in (
        scaled("layers.1.attn.z", 2.0, units=[2]),
        add("layers.1.attn.z", torch.linspace(-1, 1, 8), positions=[3]),
        add("layers.1.attn.out", V, positions=-1),
        scaled("layers.1.attn.out", -2.0),
        ablate("layers.0.attn.out", positions=[2]),
        clamped("layers.1.mlp.out", -0.1, 0.1),
        scaled("layers.1.attn.pattern", -1.0, units=[1]),
        add("embed", V, positions=[3]),
        add("layers.0.resid_pre", V, positions=-1),
    ):
        with intervene(lm, change):
            found, seen = sent(lm, lm.batch(ONE)), capture(lm, ONE, "layers.*.attn.out")
        for receiver, label in enumerate(wires.receivers):
            layer, total = (
                wires.place(receiver)[0],
                found.writes[: wires.before(receiver)].sum(dim=0),
            )
            read = (
                found.final
                if label == "logits"
                else (found.mid if "mlp" in label else found.pre)[layer]
            )
            assert tiny.gap(total, read) < 1e-4, (change, label)
        heads = found.writes[wires.head(1) : wires.head(1) + 4].sum(dim=0)
        assert tiny.gap(heads, seen["layers.1.attn.out"][0]) < 1e-4, change
    for change in (add("layers.1.resid_post", V), clamped("layers.1.attn.out", 0.0)):
        with (
            intervene(lm, change),
            pytest.raises(SiteError, match=r"layers\.1\.(mlp\.out|attn\.z)"),
        ):
            sent(lm, lm.batch(ONE))


def _hand(lm: Any, change: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model's own logits of both prompts with a plain hook at the final norm or the read-out,
    and its handle."""
    base = getattr(lm.model, "transformer", None) or lm.model.model
    module = (
        (base.ln_f if hasattr(base, "ln_f") else base.norm) if change == "final_norm" else lm.model
    )

    def after(_: Any, args: tuple, output: Any) -> Any:
        x = output if isinstance(output, torch.Tensor) else output.logits
        x = x.clone()
        for row, tokens in enumerate(CLEAN):
            x[row, len(tokens) - 1] += torch.linspace(-2, 3, x.shape[-1])
        if isinstance(output, torch.Tensor):
            return x
        output.logits = x
        return output

    handle = module.register_forward_hook(after)
    with torch.no_grad():
        ids = torch.tensor([CLEAN[0], CLEAN[1] + [0, 0]])
        logits = lm.model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    return handle, logits, torch.stack([logits[0, 6], logits[1, 4]])


@pytest.mark.parametrize("site", ["final_norm", "logits"])
@pytest.mark.parametrize("name", FAMILIES)
def test_changes_of_the_read_out_reach_every_measure(name: str, site: str) -> None:
    lm = tiny.lm(name)
    handle, logits, last = _hand(lm, site)
    true, whole = (last[:, 5] - last[:, 9]), logits.softmax(dim=-1)[..., 5]

    def check() -> None:
        said = next_token.measure(lm, CLEAN, **ASKED)
        assert tiny.gap(torch.tensor(said.logit_difference.values), true) < 1e-4
        lens = torch.tensor(logit_lens.measure(lm, CLEAN, answer=5).answer_probability.values)
        assert tiny.gap(lens[0, -1], whole[0]) < 1e-4
        assert tiny.gap(lens[1, -1, :5], whole[1, :5]) < 1e-4
        base = occlusion.measure(lm, CLEAN, **ASKED)
        assert tiny.gap(torch.tensor(base.logit_difference.values), true) < 1e-4

    try:
        check()  # a user's own hook
    finally:
        handle.remove()
    moved = torch.linspace(-2, 3, logits.shape[-1] if site == "logits" else lm.dims.dim)
    with intervene(lm, add(site, moved, positions=-1)):
        check()
        for refused in (direct_logit_attribution, contribution):
            with pytest.raises(SiteError, match=site):
                refused.measure(lm, CLEAN, **ASKED)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_read_out(name: str) -> None:
    """At the logits they are the metric's own; at the final norm autograd's on the plain model."""
    lm, tokens = tiny.lm(name), [len(row) - 1 for row in CLEAN]
    _, _, found = gradients(lm, CLEAN, ["logits", "final_norm"], lambda x: x[:, 5] - x[:, 9])
    at_logits, at_norm = found.values()
    assert at_logits.shape == (2, 7, 96)
    assert at_logits[[0, 1], tokens].sum(dim=0)[[5, 9]].tolist() == [2, -2]
    assert int(at_logits.count_nonzero()) == 4
    kept: list[torch.Tensor] = []
    base = getattr(lm.model, "transformer", None) or lm.model.model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    handle = norm.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad())
    ids = torch.tensor([CLEAN[0], CLEAN[1] + [0, 0]])
    logits = lm.model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    handle.remove()
    difference = logits[[0, 1], tokens][:, 5] - logits[[0, 1], tokens][:, 9]
    [true] = torch.autograd.grad(difference.sum(), kept)
    assert float(true.norm()) > 0.1
    assert tiny.gap(at_norm, true) < 1e-4
