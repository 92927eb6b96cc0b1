"""Edges of whole answers against plain hooks: the prompt and its corrupt one continued by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratoscope.circuits import (
    discover,
    edge_attribution,
    edge_attribution_ig,
    faithfulness,
    path_patching,
)
from stratoscope.engine.metric import Whole
from stratoscope.errors import InputError
from stratoscope.models import LM
from support import tiny
from support.nightly import by_night

CLEAN, CORRUPT = [3, 14, 15, 92, 65], [3, 14, 77, 92, 80]
ANSWER, FOIL = (5, 60, 7), (9, 61)
WHOLE: dict[str, Any] = {"answer": Whole(ANSWER), "foil": Whole(FOIL)}
EDGES = [("L0 mlp", "logits"), ("embed", "L1 mlp")]
NAMES = by_night(("llama", "gpt2"), ("llama",))


def parts(lm: LM) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    """Layer 0's MLP, the embedding's first reader (layer 0), and who reads: final norm, MLP 1's."""
    if lm.family.name == "gpt2":
        stack = lm.model.transformer
        return stack.h[0].mlp, stack.h[0], [stack.ln_f, stack.h[1].ln_2]
    stack = lm.model.model
    return (
        stack.layers[0].mlp,
        stack.layers[0],
        [stack.norm, stack.layers[1].post_attention_layernorm],
    )


def run(
    lm: LM,
    prompt: list[int],
    text: tuple[int, ...],
    before: dict[nn.Module, Callable[[Tensor], Tensor]],
    after: dict[nn.Module, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """sum_k log p(text_k | prompt, text_<k), modules' inputs and outputs sent through functions."""
    handles = [
        m.register_forward_pre_hook(lambda _, args, f=f: (f(args[0]), *args[1:]))
        for m, f in before.items()
    ]
    handles += [
        m.register_forward_hook(lambda _, args, out, f=f: f(out)) for m, f in (after or {}).items()
    ]
    logits = lm.model(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(dim=-1)
    for handle in handles:
        handle.remove()
    return sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(text))


def sends(lm: LM, prompt: list[int], text: tuple[int, ...]) -> list[Tensor]:
    """What layer 0's MLP writes, and what enters layer 0."""
    mlp, first, _ = parts(lm)
    seen: list[Tensor] = [torch.empty(0)] * 2

    def keep(n: int) -> Callable[[Tensor], Tensor]:
        return lambda x: seen.__setitem__(n, x.detach().clone()) or x

    with torch.no_grad():
        run(lm, prompt, text, {first: keep(1)}, {mlp: keep(0)})
    return seen


def along(lm: LM, edge: int, share: Tensor | float, points: Tensor | None = None) -> Tensor:
    """The difference of the sums when `share` of the corrupt prompt's write goes along one edge.
    points: how far the embedding has gone to the corrupt prompt's."""
    _, first, readers = parts(lm)
    total = []
    for text in (ANSWER, FOIL):
        ends = [sends(lm, prompt, text) for prompt in (CLEAN, CORRUPT)]
        deltas = [other - own for own, other in zip(*ends)]
        before = {readers[edge]: lambda x, d=deltas[edge]: x + share * d}
        if points is not None:
            before[first] = lambda x, d=deltas[1]: x + points * d
        total.append(run(lm, CLEAN, text, before))
    return total[0] - total[1]


def ends_by_hand(lm: LM) -> tuple[float, float]:
    with torch.no_grad():
        clean, corrupt = (
            float(run(lm, row, ANSWER, {}) - run(lm, row, FOIL, {})) for row in (CLEAN, CORRUPT)
        )
    return clean, corrupt


@pytest.mark.parametrize("name", NAMES)
def test_a_path_changes_the_prompt_and_what_follows_it(name: str) -> None:
    lm = tiny.lm(name)
    found = path_patching.measure(lm, [CLEAN], corrupt=[CORRUPT], paths=EDGES, **WHOLE)
    clean, corrupt = ends_by_hand(lm)
    for edge in range(len(EDGES)):
        with torch.no_grad():
            expected = (float(along(lm, edge, 1.0)) - clean) / (corrupt - clean)
        assert abs(expected) > 1e-3
        assert float(found.effect[0, edge]) == pytest.approx(expected, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 2])
def test_attribution_is_the_slope_of_it(name: str, steps: int) -> None:
    """At the clean prompt, and at midpoints of the way."""
    lm = tiny.lm(name)
    method = edge_attribution_ig if steps else edge_attribution
    more = {"steps": steps} if steps else {}
    found = method.measure(lm, [CLEAN], corrupt=[CORRUPT], **WHOLE, **more)
    clean, corrupt = ends_by_hand(lm)
    effect = found.effect[0].values[[_column(found, *edge) for edge in EDGES]]
    expected = []
    for edge in range(len(EDGES)):
        slopes = []
        for point in [(n + 0.5) / steps for n in range(steps)] or [None]:
            share = torch.zeros((), requires_grad=True)
            value = along(lm, edge, share, None if point is None else torch.tensor(point))
            slopes.append(float(torch.autograd.grad(value, share)[0]))
        expected.append(np.mean(slopes) / (corrupt - clean))
    np.testing.assert_allclose(effect, expected, rtol=2e-3, atol=2e-4)
    assert np.abs(expected).min() > 1e-3


def _column(found: Any, sender: str, receiver: str) -> int:
    pairs = list(zip(found.sender.values, found.receiver.values))
    return pairs.index((sender, receiver))


@pytest.mark.parametrize("name", NAMES)
def test_faithfulness_without_an_edge_is_the_run_without_it(name: str) -> None:
    lm = tiny.lm(name)
    every = edge_attribution.measure(lm, [CLEAN], corrupt=[CORRUPT], answer=5, foil=9)
    pairs = list(zip(every.sender.values.tolist(), every.receiver.values.tolist()))
    clean, corrupt = ends_by_hand(lm)
    for edge, left_out in enumerate(EDGES):
        found = faithfulness.measure(
            lm,
            [CLEAN],
            corrupt=[CORRUPT],
            circuit=[pair for pair in pairs if pair != left_out],
            draws=1,
            **WHOLE,
        )
        with torch.no_grad():
            expected = (float(along(lm, edge, 1.0)) - corrupt) / (clean - corrupt)
        assert float(found.faithfulness[0]) == pytest.approx(expected, rel=2e-3)
        assert abs(expected - 1) > 1e-3


SHORT: dict[str, Any] = {"answer": Whole((5, 60)), "foil": Whole((9,))}
CALLS: list[tuple[Any, dict[str, Any]]] = [
    (path_patching.measure, {"paths": EDGES}),
    (edge_attribution.measure, {}),
    (faithfulness.measure, {"circuit": EDGES, "draws": 1}),
]


@pytest.mark.parametrize(("measure", "more"), CALLS)
def test_one_token_each_is_the_logit_difference(measure: Any, more: dict[str, Any]) -> None:
    lm = tiny.lm("llama")
    plain, found = (
        measure(lm, [CLEAN], corrupt=[CORRUPT], **more, **asked)
        for asked in ({"answer": 5, "foil": 9}, {"answer": Whole([5]), "foil": Whole([9])})
    )
    for name in plain.data_vars:
        np.testing.assert_allclose(plain[name], found[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("measure", "more"), CALLS)
def test_batched_equals_single(measure: Any, more: dict[str, Any]) -> None:
    """Also the null, whose directions do not depend on who else is there."""
    lm = tiny.lm("llama")
    rows, corrupt = [CLEAN, [38, 46, 26]], [CORRUPT, [38, 11, 26]]
    both = measure(lm, rows, corrupt=corrupt, **more, **SHORT)
    for e, row in enumerate(rows):
        alone = measure(lm, [row], corrupt=[corrupt[e]], **more, **SHORT)
        for name in (n for n in ("effect", "null", "faithfulness") if n in both):
            np.testing.assert_allclose(both[name][e], alone[name][0], atol=1e-4, rtol=1e-3)


def test_a_circuit_of_whole_answers_is_found_and_a_mean_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discover, "SIZES", 3)
    lm = tiny.lm("gpt2")
    strength = edge_attribution.measure(lm, [CLEAN], corrupt=[CORRUPT], **SHORT)
    found = discover.measure(
        lm, [CLEAN], corrupt=[CORRUPT], limit=20, attribution=strength, **SHORT
    )
    assert 0 < found.sizes["edge"] <= 20
    assert float(found.faithfulness[-1]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match="use ablation='resample'"):
        faithfulness.measure(lm, [CLEAN], corrupt=[CORRUPT], ablation="mean", **SHORT)
