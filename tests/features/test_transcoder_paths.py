"""What a feature reads is the sum of its parts; a part is what is lost without it under a held
norm, and not under the model's own; one factor is the same on any prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.engine.dictionary import Dictionary
from stratoscope.engine.places import place, seen
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.features import transcoder_paths
from stratoscope.models import LM
from support.cases import Case
from support.dictionaries import drawn
from support.subjects import ROWS, lm_of, padded, untouched


def made(dim: int, layer: int, **more: Any) -> Dictionary:
    sites = {"site_out": f"layers.{layer}.mlp.out", "seed": layer}
    return drawn(dim, f"layers.{layer}.mlp.in", **sites, **more)


def _asked(case: Case) -> dict[str, Any]:
    """The same answer of both prompts and of each alone."""
    whole = replace(case, example=None, side="right")
    dictionaries = [made(case.lm.dims.dim, 0)]
    return {"dictionaries": dictionaries, "answer": whole.answer[0], "foil": whole.foil[0]}


EXAMPLE = {"measure": _asked}
ONE_TOKEN = "it takes one token's logit apart"
WHOLE_ANSWER = {"dictionaries": []}
NUMBER = 7


def all_of(lm: LM) -> list[Dictionary]:
    return [made(lm.dims.dim, layer, features=20 + layer) for layer in range(lm.dims.layers)]


def parts(found: Any) -> np.ndarray:
    """The sum of all parts, (example,)."""
    summed = found.attribution.sum(["layer", "feature"]) + found.error.sum("layer")
    return (
        summed + found.brought.sum(["layer", "head", "position"]) + found.embed + found.bias
    ).values


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_feature_reads_the_sum_of_its_parts(name: str) -> None:
    lm = lm_of(name)
    dictionaries = all_of(lm)
    with untouched(lm):
        found = transcoder_paths.measure(
            lm, padded(ROWS, "left"), dictionaries=dictionaries, feature=(2, NUMBER), at=-2
        )
    last = dictionaries[2]
    at = place(lm, last.site_in)
    for number, row in enumerate(ROWS):
        x = seen(lm, [row], at)[at][0, -2]
        pre = (x - last.b_dec) @ last.W_enc[:, NUMBER] + last.b_enc[NUMBER]
        assert float(found.total[number]) == pytest.approx(float(pre), abs=1e-4)
    assert np.allclose(parts(found), found.total.values, atol=1e-4)
    assert np.isnan(found.attribution.values[:, 2]).all()
    assert not np.isnan(found.attribution.values[:, 1, :21]).any()


def test_an_answer_is_the_sum_of_its_parts() -> None:
    lm = lm_of("llama")
    found = transcoder_paths.measure(lm, ROWS, dictionaries=all_of(lm)[1:2], answer=7, foil=8)
    with torch.no_grad():
        logits = [lm.model(torch.tensor([row])).logits[0, -1] for row in ROWS]
    expected = [float(x[7] - x[8]) for x in logits]
    assert np.allclose(found.total.values, expected, atol=1e-4)
    assert np.allclose(parts(found), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_head_brings_is_taken_apart_where_it_reads(name: str) -> None:
    lm = lm_of(name)
    more: dict[str, Any] = {"dictionaries": all_of(lm), "feature": (2, NUMBER)}
    whole = transcoder_paths.measure(lm, ROWS[:1], **more)
    found = transcoder_paths.measure(lm, ROWS[:1], via=[(2, 1, 3), (1, 0, 2)], **more)
    once = transcoder_paths.measure(lm, ROWS[:1], via=[(2, 1, 3)], **more)
    assert float(once.total[0]) == pytest.approx(float(whole.brought[0, 2, 1, 3]), abs=1e-5)
    assert float(found.total[0]) == pytest.approx(float(once.brought[0, 1, 0, 2]), abs=1e-5)
    for one in (once, found):
        assert np.allclose(parts(one), one.total.values, atol=1e-4)
    assert np.isnan(found.error.values[0, 1:]).all()
    assert abs(float(once.total[0])) > 1e-4


def test_a_part_is_what_is_lost_without_it_under_the_norm_as_it_was() -> None:
    """By hand, on a llama's own norm; let the norm have its new scale, and it is another number."""
    lm, row = lm_of("llama"), ROWS[0]
    dictionaries = all_of(lm)
    found = transcoder_paths.measure(lm, [row], dictionaries=dictionaries, feature=(2, NUMBER))
    runs = capture(lm, [row], "layers.2.resid_mid")
    x = runs["layers.2.resid_mid"][0, -1].double()
    norm = lm.model.model.layers[2].post_attention_layernorm
    scale = (x.square().mean() + norm.variance_epsilon).rsqrt()
    assert float(found.scale[0]) == pytest.approx(float(scale), rel=1e-4)
    reads = dictionaries[2].W_enc[:, NUMBER].double() * norm.weight.detach().double()
    at = place(lm, dictionaries[1].site_in)
    z = dictionaries[1].encode(seen(lm, [row], at)[at][0, -1])
    assert np.allclose(found.activation.values[0, 1, :21], z, atol=1e-5)
    unheld = []
    for feature in z.nonzero()[:, 0].tolist():
        less = x - (z[feature] * dictionaries[1].W_dec[feature]).double()
        lost = scale * reads @ (less - x)
        part = float(found.attribution[0, 1, feature])
        assert part == pytest.approx(-float(lost), abs=1e-4)
        other = (less.square().mean() + norm.variance_epsilon).rsqrt() * reads @ less
        unheld.append(abs(float(other - scale * reads @ x) + part))
    assert max(unheld) > 1e-3


def test_one_factor_is_of_the_input_and_one_of_the_weights() -> None:
    lm = lm_of("gpt2")
    dictionaries = all_of(lm)
    found = transcoder_paths.measure(lm, ROWS, dictionaries=dictionaries, feature=(2, NUMBER))
    rebuilt = found.activation * found.invariant * found.scale
    assert np.allclose(rebuilt.values, found.attribution.values, atol=1e-6, equal_nan=True)
    one, two = (found.isel(example=n) for n in (0, 1))
    both = (one.activation.values[:2] > 0.01) & (two.activation.values[:2] > 0.01)
    ratio = [(f.attribution / f.activation / f.scale).values[:2][both] for f in (one, two)]
    assert both.sum() > 5
    assert np.allclose(*ratio, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_asked_is_refused() -> None:
    lm = lm_of("llama")
    one = made(32, 1)
    for more, said in (
        ({"dictionaries": [one], "feature": (0, 3)}, "one of layer 1 with 24 features"),
        ({"dictionaries": [one], "feature": (1, 24)}, "one of layer 1 with 24 features"),
        ({"dictionaries": [one]}, "an answer and a foil"),
        ({"dictionaries": [one, one], "feature": (1, 3)}, "one a layer"),
        ({"dictionaries": [drawn(32, "layers.1.mlp.out")], "feature": (1, 3)}, "give transcoders"),
        ({"dictionaries": [], "feature": (1, 3)}, "at least one transcoder"),
        ({"dictionaries": [one], "feature": (1, 3), "at": 9}, "tokens"),
        ({"dictionaries": [one], "feature": (1, 3), "via": [(2, 0, 0)]}, "of layer 0 to 1"),
    ):
        with pytest.raises(InputError, match=said):
            transcoder_paths.measure(lm, ROWS, **more)
