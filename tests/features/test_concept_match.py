"""features.concept_match: matches by hand on plain hidden states, a planted concept found on held
out prompts where length and words tell nothing, and what must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from stratoscope.errors import InputError
from stratoscope.features import concept_match
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from support.subjects import ROWS, close, lm_of, padded, untouched

FITTED: dict[int, concept_match.Detector] = {}


def texts(case) -> list[list[int]]:
    """Four prompts without pictures."""
    start = 5 if case.name == "llava" else 0
    return [row[start:] for row in (*case.rows, *case.turned)]


def of(case) -> concept_match.Detector:
    """A detector for the case's model, fitted on four prompts."""
    key = id(case.lm)
    if key not in FITTED:
        FITTED[key] = concept_match.fit(case.lm, **EXAMPLE["fit"](case))
    return FITTED[key]


EXAMPLE = {
    "fit": lambda case: {
        "inputs": texts(case),
        "labels": [0, 1, 0, 1],
        "concepts": texts(case)[2:],
        "hidden": 4,
    },
    "measure": lambda case: {"fitted": of(case)},
}


def plain(lm: LM, row: list[int]) -> torch.Tensor:
    """The last token after every layer but the last, by plain Transformers."""
    with torch.no_grad():
        states = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states[1:-1]
    return torch.stack([x[0, -1] for x in states])


def test_the_match_by_hand_and_a_concept_more_never_lowers_it() -> None:
    lm = lm_of("llama")
    known, concepts = [*ROWS, [9, 8, 7], [5, 60, 2, 3]], [[3, 4], [61, 7, 7]]
    with untouched(lm):
        fitted = concept_match.fit(lm, known, labels=[0, 1, 0, 1], concepts=concepts, hidden=3)
        found = concept_match.measure(lm, padded(ROWS, "left"), fitted=fitted)
    learned = torch.stack([plain(lm, row) for row in known])
    mean, std = learned.mean(dim=0), learned.std(dim=0)
    ideas = [(plain(lm, row) - mean) / std for row in concepts]
    for example, row in enumerate(ROWS):
        e = (plain(lm, row) - mean) / std
        products = torch.stack([(e * idea).sum(dim=-1) for idea in ideas])
        close(found.match[example, :-1], products.max(dim=0).values, 1e-4)
        assert found.nearest[example, :-1].values.tolist() == products.argmax(dim=0).tolist()
    more = concept_match.fit(
        lm, known, labels=[0, 1, 0, 1], concepts=[*concepts, [33, 9]], hidden=3
    )
    assert (concept_match.measure(lm, ROWS, fitted=more).match >= found.match - 1e-4).all()
    right = concept_match.measure(lm, padded(ROWS, "right"), fitted=fitted)
    close(right.match, found.match, 1e-4)
    x, y = torch.randn(5, 2, 7), torch.randn(3, 2, 7)
    same, _ = concept_match.match(x, y, cosine=True)
    close(same, concept_match.match(4 * x, 0.1 * y, cosine=True)[0], 1e-5)
    assert float(same.max()) <= 1 + 1e-6


def two_orders(n: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of one length that all hold 7 and 8: those of kind 1 end with 7, the others with
    8."""
    rows = np.random.default_rng(seed).integers(10, 90, (n, 8))
    labels = [number % 2 for number in range(n)]
    for row, kind in zip(rows, labels):
        row[[1, -1]] = (8, 7) if kind else (7, 8)
    return rows.tolist(), labels


def test_a_planted_kind_is_found_and_its_length_and_words_tell_nothing(tmp_path: Path) -> None:
    lm = lm_of("llama")
    lm.model.get_input_embeddings().weight.data *= 30  # a token is above all itself
    (known, labels), (asked, truth) = two_orders(80, 0), two_orders(60, 1)
    concepts = [[11, 12, 7], [60, 20, 61, 7]]
    fitted = concept_match.fit(lm, known, labels=labels, concepts=concepts, hidden=8)
    score = concept_match.measure(lm, asked, fitted=fitted).score.values
    fitted.save(tmp_path / "detector")
    again = concept_match.measure(lm, asked, fitted=tmp_path / "detector").score.values
    assert np.array_equal(again, score)
    others = concept_match.controls(lm, known, labels=labels, other=asked)
    assert roc_auc_score(truth, score) > 0.95
    assert roc_auc_score(truth, others["length"]) == 0.5
    assert abs(roc_auc_score(truth, others["words"]) - 0.5) < 0.25
    dealt = np.random.default_rng(2).permutation(labels).tolist()
    twin = concept_match.fit(lm, known, labels=dealt, concepts=concepts, hidden=8)
    wrong = concept_match.measure(lm, asked, fitted=twin).score.values
    assert abs(wrong - 0.5).max() < 0.1 < 0.3 < abs(score - 0.5).min()


def test_words_and_length_are_found_where_they_tell() -> None:
    lm = lm_of("llama")
    rows = [[5, 9, 11], [5, 8, 12], [5, 9, 13, 14], [5, 8, 15, 16]] * 3
    found = concept_match.controls(lm, rows, labels=[1, 0, 1, 0] * 3, other=rows[:4])
    assert found["words"][0] > 0.8 > 0.2 > found["words"][1]
    found = concept_match.controls(lm, rows, labels=[0, 0, 1, 1] * 3, other=rows[:4])
    assert found["length"][2] > 0.6 > 0.4 > found["length"][1]


def test_refusals() -> None:
    lm = lm_of("llama")
    for labels in ([1, 1], [0, 1, 0], [0, 2], [0, 1]):
        with pytest.raises(InputError, match="two or more of each"):
            concept_match.fit(lm, ROWS, labels=labels, concepts=ROWS)
    with pytest.raises(InputError, match="two or more of each; got 4 labels, 0 times 0 and 4"):
        concept_match.fit(lm, [*ROWS, *ROWS], labels=[1, 1, 1, 1], concepts=ROWS)
    with pytest.raises(InputError, match="one unit or more"):
        concept_match.fit(lm, [*ROWS, *ROWS], labels=[1, 0, 1, 0], concepts=ROWS, hidden=0)
    fitted = concept_match.fit(lm, [*ROWS, *ROWS], labels=[1, 0, 1, 0], concepts=ROWS, hidden=2)
    story = planted.induction()
    with pytest.raises(InputError, match="fit one for it"):
        concept_match.measure(wrap(story.model, story.tokenizer), story.clean, fitted=fitted)
