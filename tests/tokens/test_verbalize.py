"""What is said is what the numbers say: every paragraph passes `check`, every falsified one fails
it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from stratoscope import catalogue
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import _spoken, integrated_gradients, occlusion, verbalize
from support.subjects import ROWS, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}

TOKENS = ["The", " keys", " to", ' "', " cabinet", " 50%", "\n", " to"]
SHARP = np.array([0.1, 6.0, -2.0, 0.1, -0.1, 1.5, 0.1, 0.1])
FLAT = np.array([1.0, 1.1, -1.2, 0.9, -1.3, 1.4, 0.8, 0.7])


def test_a_paragraph_by_hand() -> None:
    assert verbalize.describe(TOKENS, SHARP, 2) == (
        'the attribution is largest at " keys" (position 1, 60%, towards the answer) and " to" '
        "(position 2, 20%, "
        "towards the foil), in parts of its absolute total. Together they hold 80%; 2 of 8 would "
        "hold 25% if all "
        "tokens counted alike."
    )
    assert (
        verbalize.describe(TOKENS, 0 * SHARP, 2) == "no token holds one percent of the attribution."
    )


def test_the_hedge_stands_exactly_where_it_is_due() -> None:
    """The bound is a third of the way from an even share to everything: 58% for three of eight
    tokens."""
    for held, due in ((0.57, True), (0.60, False)):
        values = np.array([held / 3] * 3 + [(1 - held) / 5] * 5)
        text = verbalize.describe(TOKENS, values, 3)
        assert (verbalize.DIFFUSE in text) == due
        assert verbalize.check(text, TOKENS, values) == []
        turned = text.replace(verbalize.DIFFUSE, "") if due else f"{text} {verbalize.DIFFUSE}"
        assert verbalize.check(turned, TOKENS, values)
    assert verbalize.DIFFUSE not in verbalize.describe(TOKENS[:2], np.array([1.0, 1.0]), 3)


@pytest.mark.parametrize("top", [1, 3, 8, 20])
def test_generated_paragraphs_are_faithful(top: int) -> None:
    generator = np.random.default_rng(0)
    for values in (SHARP, FLAT, -SHARP, 0 * SHARP, *generator.standard_cauchy((50, 8))):
        gaps = np.where(np.arange(8) == 6, np.nan, values)
        for attribution in (values, gaps):
            text = verbalize.describe(TOKENS, attribution, top)
            assert verbalize.check(text, TOKENS, attribution) == []


@pytest.mark.parametrize(
    ("true", "false"),
    [
        ('" keys" (position 1', '" keys" (position 2'),  # another place
        ('" keys" (position 1', '" locks" (position 1'),  # a token that is not there
        ('" keys" (position 1', '" keys" (position 11'),  # a place that is not there
        ("60%", "61%"),
        ("Together they hold 80%", "Together they hold 90%"),
        ("2 of 8", "2 of 9"),
        ("towards the foil", "towards the answer"),
        (
            '" to" (position 2, 20%, towards the foil)',
            '" 50%" (position 5, 15%, towards the answer)',
        ),  # third, not second
        (
            '" to" (position 2, 20%, towards the foil)',
            '" keys" (position 1, 60%, towards the answer)',
        ),  # twice
        ("alike.", 'alike. So does " cabinet".'),
        ("alike.", "alike. That is 3.5% more."),
        ("alike.", f"alike. {verbalize.DIFFUSE}"),
        ("largest", "smallest at all but largest, by 12 %,"),
    ],
)
def test_a_falsified_paragraph_fails(true: str, false: str) -> None:
    text = (
        'The logit of the answer " to" is above that of the foil " 50%". By it, '
        f"{verbalize.describe(TOKENS, SHARP, 2)}"
    )
    assert verbalize.check(text, TOKENS, SHARP) == []
    assert true in text
    assert verbalize.check(text.replace(true, false), TOKENS, SHARP)


def test_a_paragraph_is_read_back_as_the_map_it_tells() -> None:
    generator = np.random.default_rng(1)
    for values in (SHARP, FLAT, -SHARP, 0 * SHARP, *generator.standard_cauchy((50, 8))):
        found = verbalize.read_back(verbalize.describe(TOKENS, values, 3), 8)
        cited = verbalize.strongest(values, 3)
        share = values / (np.abs(values).sum() or 1)
        assert [*np.flatnonzero(found)] == sorted(cited)
        assert np.abs(found - share)[cited].max(initial=0) <= 0.005 + 1e-9
    assert verbalize.read_back(verbalize.describe(TOKENS, SHARP, 2), 8)[[1, 2]].tolist() == [
        0.6,
        -0.2,
    ]
    with pytest.raises(InputError, match="cites position 2 of 2"):
        verbalize.read_back(verbalize.describe(TOKENS, SHARP, 2), 2)


def test_the_numbers_of_another_map_fail() -> None:
    assert verbalize.check(verbalize.describe(TOKENS, SHARP, 3), TOKENS, FLAT)
    assert verbalize.check("Nothing to see.", TOKENS, SHARP)


NAMES = ("copy_head", "induction", "induction_gpt2", "fact_lookup", "fact_lookup_moved", "two_hop")


@pytest.mark.parametrize("p", [getattr(planted, name)() for name in NAMES], ids=lambda p: p.name)
def test_planted_positions_are_said(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    prompts = [p.clean, p.clean.split()[0]]
    with untouched(lm):
        found = verbalize.measure(lm, prompts, answer=p.answer, foil=p.foil, top=5)
    map_ = occlusion.measure(lm, prompts, answer=p.answer, foil=p.foil).attribution.values
    tokens = p.clean.split()
    texts = list(found.text.values)
    assert verbalize.check(texts[0], tokens, map_[0, : len(tokens)]) == []
    assert verbalize.check(texts[1], tokens[:1], map_[1, :1]) == []
    said = [i for i in found.cited.values[0] if i >= 0]
    assert set(said) == set(p.positions)  # others hold less than one percent
    assert set(found.direction.values[0, : len(said)]) == {"answer"}
    second = integrated_gradients.measure(lm, prompts, answer=p.answer, foil=p.foil)
    two = verbalize.measure(lm, prompts, answer=p.answer, foil=p.foil, top=5, second=second)
    assert two.agreement.values[0] == len(said)
    assert "the two agree on most" in str(two.text.values[0])
    assert np.isnan(found.share.values[0, len(said) :]).all()
    assert 0.98 < np.nansum(found.share.values[0]) <= 1
    logits = p.model(**p.tokenizer(p.clean, return_tensors="pt")).logits[0, -1].detach()
    assert (
        f'"{p.tokenizer.decode(logits.argmax())}" (probability '
        f"{float(logits.softmax(0).max()):.2f})" in texts[0]
    )
    assert found.prediction.values[0] == p.answer


def test_disagreement_is_said() -> None:
    p = planted.copy_head()
    lm, words = wrap(p.model, p.tokenizer), {"answer": p.answer, "foil": p.foil}
    truth = occlusion.measure(lm, p.clean, **words)
    wrong = truth.copy(deep=True)
    wrong["attribution"].values[:] = truth.attribution.values[:, ::-1]
    flipped = truth.assign(attribution=-truth.attribution)
    for second, agreement, said in (
        (truth, 2, "agree on most"),
        (wrong, 0, "disagree"),
        (flipped, 0, "disagree"),
    ):
        found = verbalize.measure(lm, p.clean, saliency=truth, second=second, **words)
        assert int(found.agreement[0]) == agreement
        assert said in str(found.text.values[0])
    assert "disagree" in _spoken.opinion("tokens.occlusion", 1, 2)  # half is not most


def test_without_a_second_opinion_the_text_says_so() -> None:
    p = planted.copy_head()
    lm, words = wrap(p.model, p.tokenizer), {"answer": p.answer, "foil": p.foil}
    found = verbalize.measure(lm, p.clean, **words)
    text, map_ = (
        str(found.text.values[0]),
        occlusion.measure(lm, p.clean, **words).attribution.values[0],
    )
    assert text.endswith("Shapley values are the one to ask (docs/attribution.md).")
    assert "agree" not in text
    assert found.agreement.values.tolist() == [-1]
    assert json.loads(found.attrs["settings"])["second"] == ""
    assert verbalize.check(text, p.clean.split(), map_) == []


def test_the_second_opinion_is_what_the_bench_chose() -> None:
    bench = Path(__file__).parents[2] / "bench" / "attribution.json"
    chosen = json.loads(bench.read_text("utf-8"))["second_opinion"]
    assert (chosen, verbalize.SECOND) == (f"{verbalize.ORDERS} orders", "tokens.shapley")
    taken = inspect.signature(catalogue.module(verbalize.SECOND).measure).parameters
    assert taken["permutations"].default == verbalize.ORDERS


def test_padding_does_not_matter_and_every_paragraph_is_faithful() -> None:
    lm = lm_of("llama")
    words = {"answer": 5, "foil": 60}
    saliency = integrated_gradients.measure(lm, ROWS, **words)
    both = [
        verbalize.measure(lm, padded(ROWS, side), saliency=saliency, **words)
        for side in ("left", "right")
    ]
    for e, row in enumerate(ROWS):
        alone = verbalize.measure(
            lm, [row], saliency=saliency.isel(example=[e], position=slice(len(row))), **words
        )
        assert {str(x.text.values[0]) for x in (alone,)} == {str(x.text.values[e]) for x in both}
        assert (
            verbalize.check(
                str(alone.text.values[0]), list(map(str, row)), saliency.attribution.values[e]
            )
            == []
        )


def test_refusals() -> None:
    lm = lm_of("gpt2")
    saliency = occlusion.measure(lm, ROWS, answer=5, foil=60)
    with pytest.raises(InputError, match="text"):
        verbalize.measure(lm, ROWS[::-1], answer=5, foil=60, saliency=saliency)
    with pytest.raises(InputError, match="foil"):
        verbalize.measure(lm, ROWS, answer=5, foil=61, saliency=saliency)
    with pytest.raises(InputError, match="axes"):
        verbalize.measure(
            lm,
            ROWS,
            answer=5,
            foil=60,
            saliency=saliency.attribution.drop_vars("text").isel(position=0),
        )
    with pytest.raises(InputError, match="top"):
        verbalize.measure(lm, ROWS, top=0)
