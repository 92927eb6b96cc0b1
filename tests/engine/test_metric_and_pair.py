"""Answers, foils and aligned prompt pairs: read as people give them, refused where a number would
mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.pair import pair
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import tiny

ROWS = tiny.inputs("llama")


def final(name: str, rows: list[list[int]]) -> torch.Tensor:
    """The plain model, one prompt at a time."""
    with torch.no_grad():
        return torch.stack([tiny.model(name)(torch.tensor([row])).logits[0, -1] for row in rows])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bloom"])
def test_the_last_logits_are_the_model_s(name: str) -> None:
    assert tiny.gap(last_logits(tiny.lm(name), ROWS), final(name, ROWS)) < 1e-4


def test_defaults_are_the_top_two() -> None:
    top = final("llama", ROWS).topk(2).indices
    asked = target(tiny.lm("llama"), ROWS)
    assert asked.answer.tolist() == top[:, 0].tolist()
    assert asked.foil.tolist() == top[:, 1].tolist()
    given = target(tiny.lm("llama"), ROWS, foil=int(top[0, 0]))
    assert int(given.answer[0]) == int(top[0, 1])
    other = target(tiny.lm("llama"), ROWS, answer=[int(top[0, 0]), int(top[1, 1])])
    assert other.foil.tolist() == [int(top[0, 1]), int(top[1, 0])]


def test_the_difference_belongs_to_its_example() -> None:
    asked = target(tiny.lm("llama"), ROWS, [5, 6], [7, 8])
    logits = final("llama", ROWS)
    expected = torch.stack([logits[0, 5] - logits[0, 7], logits[1, 6] - logits[1, 8]])
    assert tiny.gap(asked.difference(logits), expected) < 1e-6
    mixed = asked.difference(logits[[1, 0, 1]], torch.tensor([1, 0, 1]))
    assert tiny.gap(mixed, expected[[1, 0, 1]]) < 1e-6


def test_words_are_tokens_and_their_number_is_said() -> None:
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    words = list(p.tokenizer.get_vocab())
    asked = target(lm, p.clean, words[5], words[6])
    assert asked.answer.tolist() == [p.tokenizer.get_vocab()[words[5]]]
    assert asked.answer_text == (words[5],)
    assert asked.notes == ()
    several = target(lm, p.clean, f"{words[5]} {words[6]}", words[7])
    assert int(several.answer[0]) == p.tokenizer.get_vocab()[words[5]]
    assert "is 2 tokens; its first" in several.notes[0]
    assert "--whole" in several.notes[0]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_pair_keeps_the_sites_of_its_own_passes(direction: Any) -> None:
    lm, site, corrupt = tiny.lm("llama"), "layers.*.attn.z", [row[::-1] for row in ROWS]
    both = pair(lm, ROWS, corrupt, direction=direction, sites=site)
    plain = pair(lm, ROWS, corrupt, direction=direction)
    assert plain.base_values is None
    for name in ("clean_difference", "corrupt_difference", "rounding"):
        assert torch.equal(getattr(both, name), getattr(plain, name))
    assert torch.equal(both.base_values, capture(lm, both.base, site).stack(site))
    assert torch.equal(both.source_values, capture(lm, both.source, site).stack(site))
    assert not torch.equal(both.base_values, both.source_values)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_known_logits_are_not_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm(name)
    batch = lm.batch(ROWS)
    assert lm.batch(batch) is batch
    logits, asked = last_logits(lm, batch), target(lm, batch)
    monkeypatch.setattr(type(lm), "__call__", lambda *_, **__: pytest.fail("the model ran"))
    again = target(lm, batch, logits=logits)
    assert (again.answer_text, again.foil_text) == (asked.answer_text, asked.foil_text)


@pytest.mark.parametrize(
    ("answer", "foil", "reason"),
    [
        (5, 5, "same token '5'"),
        ([1, 2, 3], None, "3 answers for 2 examples"),
        (96, None, "outside the vocabulary of 96"),
        (-1, None, "outside"),
        (" Mary", None, "without a tokenizer"),
        ([4, 5], [6, 5], "same token"),
    ],
)
def test_bad_targets_are_refused(answer: Any, foil: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        target(tiny.lm("llama"), ROWS, answer, foil)


def test_a_pair_measures_both_ends() -> None:
    lm, corrupt = tiny.lm("llama"), [[*ROWS[0][:-1], 77], [*ROWS[1][:-1], 78]]
    both = pair(lm, ROWS, corrupt, [5, 6], [7, 8])
    for rows, got in ((ROWS, both.clean_difference), (corrupt, both.corrupt_difference)):
        logits = final("llama", rows)
        assert (
            tiny.gap(got, torch.stack([logits[0, 5] - logits[0, 7], logits[1, 6] - logits[1, 8]]))
            < 1e-4
        )
    assert both.base is both.corrupt
    assert tiny.gap(both.normalise(both.corrupt_difference), torch.zeros(2)) == 0
    assert tiny.gap(both.normalise(both.clean_difference), torch.ones(2)) < 1e-6
    turned = pair(lm, ROWS, corrupt, [5, 6], [7, 8], "noise")
    assert turned.base is turned.clean
    assert tiny.gap(turned.normalise(turned.corrupt_difference), torch.ones(2)) < 1e-6


def test_a_pair_s_defaults() -> None:
    lm, corrupt = tiny.lm("llama"), [[*ROWS[0][:-1], 77], [*ROWS[1][:-1], 78]]
    both = pair(lm, ROWS, corrupt)
    best = final("llama", ROWS).argmax(dim=1)
    assert both.target.answer.tolist() == best.tolist()
    for example, top in enumerate(final("llama", corrupt).topk(2).indices.tolist()):
        expected = top[1] if top[0] == int(best[example]) else top[0]
        assert int(both.target.foil[example]) == expected


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (ROWS[:1], "2 clean and 1 corrupt"),
        ([ROWS[0], ROWS[1][:-1]], "clean prompt 1 has 5 tokens"),
        (ROWS, "there is nothing to restore"),
        (ROWS[::-1], "clean prompt 0 has 9 tokens and its corrupt prompt 5"),
    ],
)
def test_pairs_that_do_not_pair_are_refused(corrupt: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        pair(tiny.lm("llama"), ROWS, corrupt)


def test_rounding_is_told_by_the_pair_that_it_moves_most() -> None:
    """A step of 0.1 is a fifth of a gap of 0.5, and a twentieth of a gap of 2."""
    both = pair(tiny.lm("llama"), ROWS, [[*row[:-1], 77] for row in ROWS], [5, 6], [7, 8])
    gaps = {"clean_difference": torch.tensor([2.0, 0.5]), "corrupt_difference": torch.zeros(2)}
    both = replace(both, **gaps, rounding=torch.tensor([0.1, 0.1]))
    assert "effect of up to 0.2, the largest of the null 0.39" in both.notes(
        torch.tensor([0.1, -0.39, torch.nan])
    )
    assert both.notes(torch.tensor([0.1, -0.41, torch.nan])) == ""
