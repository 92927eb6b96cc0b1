"""What the report leaves out for its price, it says."""

from __future__ import annotations

import pytest

from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.report import page
from stratoscope.report.explain import SHAPLEY_TOKENS, STEPS, explain


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
