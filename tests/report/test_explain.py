"""What the report leaves out for its price, it says; what it switches off is what a clamp switches
off."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.editing import clamp
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.report import page
from stratoscope.report.explain import SHAPLEY_TOKENS, STEPS, _undecided, explain
from stratoscope.tokens import next_token


@pytest.mark.parametrize("length", [SHAPLEY_TOKENS, SHAPLEY_TOKENS + 1])
def test_shapley_values_are_asked_of_short_prompts_alone(length: int) -> None:
    truth = planted.copy_head()
    lm = wrap(truth.model, truth.tokenizer)
    prompt = " ".join((truth.clean.split() * length)[:length])
    assert len(lm.batch(prompt).tokens[0]) == length
    wanted = ("tokens.shapley", "tokens.occlusion", "tokens.verbalize")
    skip = [step for step in STEPS[1:] if step not in wanted]
    made = explain(lm, prompt, answer=truth.answer, foil=truth.foil, skip=skip)
    assert ("tokens.shapley" in made.results) == (length <= SHAPLEY_TOKENS)
    if length > SHAPLEY_TOKENS:
        assert made.missing["tokens.shapley"].startswith("21 tokens would take 672 passes")
        assert "21 tokens would take 672 passes" in page.render(made)
        said = str(made.one("tokens.verbalize")["text"].values)
        assert "No second opinion was given" in said


def test_a_neuron_switched_off_is_a_clamp_at_zero() -> None:
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    words = {"answer": p.answer, "foil": p.foil}
    skip = {*STEPS[1:]} - {"neurons.contribution", "neurons.vocabulary", "clamp"}
    off = explain(lm, p.clean, **words, skip=skip).results["clamp"]
    units = list(zip(off["layer"].values.tolist(), off["neuron"].values.tolist()))
    assert units[0] in p.neurons
    whole = float(next_token.measure(lm, p.clean, **words)["logit_difference"][0])
    for number, unit in enumerate(units):
        with clamp.edit(lm, [unit]):
            without = float(next_token.measure(lm, p.clean, **words)["logit_difference"][0])
        assert float(off["difference_before"][number]) == pytest.approx(whole, abs=1e-3)
        assert float(off["difference_after"][number]) == pytest.approx(without, abs=1e-3)
    assert float(off["difference_after"][0]) < whole - 9
    assert off["null_change"].shape == (20,)
    assert abs(off["null_change"]).max() < 0.5


@pytest.mark.parametrize("words", [2, 40, 49_152])
def test_a_model_without_preference_gets_no_confident_story(words: int) -> None:
    """Of two classes nothing can be told; of many tokens a flat guess is told from a choice."""
    top = min(words, 10)
    flat = np.full(top, 1 / words)
    chosen = np.full(top, 0.1 / words)
    chosen[0] = 0.4
    assert bool(_undecided(flat, words)) == (words > 2)
    assert not _undecided(chosen, words)


def test_an_untrained_model_says_so_and_a_trained_one_does_not() -> None:
    p = planted.fact_lookup()
    torch.manual_seed(0)
    untrained = type(p.model)(p.model.config)
    hardly = [
        any(
            "hardly prefers one token" in note
            for note in explain(lm, p.clean, skip=STEPS[1:]).notes
        )
        for lm in (wrap(untrained, p.tokenizer), wrap(p.model, p.tokenizer))
    ]
    assert hardly == [True, False]
