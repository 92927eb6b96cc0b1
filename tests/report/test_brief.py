"""A result in words never names a cause that does not beat its null."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from stratoscope import catalogue
from stratoscope.errors import ResultError
from stratoscope.heads import activation_patching
from stratoscope.lab import planted
from stratoscope.layers import logit_lens
from stratoscope.models import wrap
from stratoscope.neurons import ablation
from stratoscope.report.brief import brief, chance, does_not_show
from stratoscope.tokens import next_token


def made(effect, **more) -> xr.Dataset:
    effect = np.asarray(effect, dtype=float)
    axes = ("layer", "head")
    return xr.Dataset({"effect": (axes, effect)} | more, attrs={"method": "made.up", "draws": 9})


def test_only_what_is_beyond_the_bound_is_named() -> None:
    text = brief(made([[0.5, -0.6, 0.1], [0.2, -0.05, 0.3]], bound=((), 0.3)))
    assert "Chance reaches 0.3 (9 draws)." in text
    assert "Beyond chance, 2 of 6: layer 0 head 1 −0.6; layer 0 head 0 +0.5." in text
    text = brief(made([[0.2, -0.3]], bound=((), 0.3)))  # as far as chance is not beyond it
    assert "Nothing of 2 is beyond chance; the largest is layer 0 head 1 −0.3." in text
    assert "Beyond" not in text


def test_of_many_the_largest_null_is_the_bound_and_other_axes_keep_their_own() -> None:
    null = (("layer", "head"), np.array([[0.0, 0.9], [0.1, 0.0]]))
    assert float(chance(made([[1.0, 0.5], [0.2, 0.1]], null=null), "effect")) == 0.9
    draws = (("draw",), np.array([0.1, -0.4]))
    assert float(chance(made([[1.0]], null=draws), "effect")) == 0.4
    roles = xr.Dataset(
        {
            "score": (("role", "head"), np.array([[0.5, 0.1], [30.0, 1.0]])),
            "null": (("role", "head"), np.array([[0.2, 0.0], [0.0, 20.0]])),
        },
        coords={"role": ["copying", "name_mover"]},
    )
    assert chance(roles, "score").values.tolist() == [0.2, 20.0]
    assert "Beyond chance, 2 of 4" in brief(roles)


def test_without_a_null_no_cause_is_claimed() -> None:
    text = brief(made([[0.5]]))
    assert "this method has no null. It shows what is there, and no cause." in text
    nan = brief(made([[0.5]], bound=((), np.nan)))
    assert "No null was drawn" in nan
    assert "Beyond" not in text + nan
    assert "No number" in brief(made([[np.nan]], bound=((), 0.1)))


def test_an_interval_that_holds_nothing_says_so() -> None:
    axes = ("depth",)
    data = xr.Dataset(
        {
            "gain": (axes, np.array([0.5, -0.1])),
            "gain_low": (axes, np.array([0.2, -0.3])),
            "gain_high": (axes, np.array([0.8, 0.2])),
        }
    )
    text = brief(data)
    assert "depth 0 +0.5 [0.2 to 0.8];" in text
    assert "depth 1 −0.1 [−0.3 to 0.2] (its interval holds 0)" in text


def test_real_results_and_many_examples() -> None:
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    words = {"answer": p.answer, "foil": p.foil}
    patched = activation_patching.measure(lm, p.clean, corrupt=p.corrupt, **words)
    assert "Nothing of 8 is beyond chance" in brief(patched)  # the fact is in neurons
    [unit] = sorted(p.neurons)[:1]
    text = brief(ablation.measure(lm, p.clean, units=[unit], **words))
    assert f"Beyond chance, 1 of 1: layer {unit[0]} neuron {unit[1]}" in text
    said = brief(next_token.measure(lm, p.clean, **words), top=1)
    assert f"Largest: rank 0 {p.answer.strip()!r}" in said.replace("' ", "'")
    many = brief(logit_lens.measure(lm, [p.clean] * 5), top=2)
    assert "5 examples." in many
    assert "Example 2: Largest:" in many
    assert "2 more examples are not listed" in many
    with pytest.raises(ResultError, match="has the numbers"):
        brief(patched, "nonsense")


def test_every_method_of_the_house_says_what_it_does_not_show() -> None:
    lacking = [
        entry.address
        for entry in catalogue.methods()
        if "measure" in entry.verbs and len(does_not_show(entry.address)) < 20
    ]
    assert lacking == []
    assert does_not_show("no.method") == ""
