"""Concept depth: the paper's two depths by hand, probes on planted models, and what saves, loads
and pads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.layers import concept_depth
from stratoscope.models import LM, wrap
from support import tiny

EXAMPLE = {
    "fit": lambda case: {"inputs": case.rows * 2, "labels": [0, 1] * 2, "folds": 2, "batch": 2}
}


def test_depths_by_hand() -> None:
    curve = np.array([0.5, 0.52, 0.54, 0.70, 0.80, 0.86, 0.85, 0.88])
    assert concept_depth.jump_depth(curve) == 3  # 0.70 / 0.54 is the first of at least 1.1
    assert concept_depth.convergence_depth(curve) == 5  # 0.86 >= 0.88 - 0.03
    assert concept_depth.convergence_depth(curve, within=0.1) == 4
    assert concept_depth.jump_depth(np.array([0.5, 0.55])) == 1
    assert np.isnan(concept_depth.jump_depth(np.full(4, 0.6)))
    assert concept_depth.convergence_depth(np.full(4, 0.6)) == 0


def two_names(
    p: planted.Planted, words: tuple[str, str], n: int
) -> tuple[LM, list[str], list[int]]:
    """Prompts of a planted mechanism that hold one of two words, and which."""
    kept = [v.clean for v in p.variants(60 * n, seed=1) if len({*v.clean.split()} & {*words}) == 1]
    kinds = [int(words[1] in text.split()) for text in kept]
    some = [[i for i, kind in enumerate(kinds) if kind == wanted][:n] for wanted in (0, 1)]
    order = [i for pair in zip(*some) for i in pair]
    return wrap(p.model, p.tokenizer), [kept[i] for i in order], [kinds[i] for i in order]


def test_a_moved_word_is_readable_after_the_layer_that_moves_it() -> None:
    p = planted.suppression()
    lm, texts, kinds = two_names(p, ("Finn", "Hana"), 20)
    found = concept_depth.fit(lm, texts, labels=kinds).result
    [(layer, _)] = p.heads
    # "who" stands last in all of them
    assert found.accuracy.sel(depth=layer) == pytest.approx(0.5, abs=0.15)
    assert found.accuracy.sel(depth=layer + 1) == 1
    assert found.jump_depth == found.convergence_depth == layer + 1
    assert (abs(found.null - 0.5) < 0.3).all()


def test_states_read_once_give_what_the_texts_give(monkeypatch) -> None:
    p = planted.suppression()
    lm, texts, kinds = two_names(p, ("Finn", "Hana"), 10)
    whole = concept_depth.fit(lm, texts, labels=kinds, seed=3)
    read = concept_depth.states(lm, texts)
    monkeypatch.setattr(concept_depth, "capture", None)  # the model is run no more
    again = concept_depth.fit(lm, read, labels=kinds, seed=3)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.correct, whole.correct)
    assert torch.equal(again.null_correct, whole.null_correct)
    with pytest.raises(InputError, match="one for each"):
        concept_depth.fit(lm, read[1:], labels=kinds)


def kinds_of(n: int) -> tuple[list[list[int]], list[int]]:
    """Token rows of different length; the kind is whether the first token is large, so no single
    dimension says it."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 90, int(generator.integers(3, 9))).tolist() for _ in range(n)]
    return rows, [int(row[0] > 45) for row in rows]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_and_batches_do_not_matter(name: str) -> None:
    lm, (rows, kinds) = wrap(tiny.model(name)), kinds_of(24)
    width = max(map(len, rows))
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    one = concept_depth.fit(lm, rows, labels=kinds, folds=3)
    two = concept_depth.fit(
        lm, {"input_ids": left, "attention_mask": mask}, labels=kinds, folds=3, batch=5
    )
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(one.correct, two.correct)
    assert torch.equal(one.null_correct, two.null_correct)


def test_probes_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = tiny.model("llama")
    lm, (rows, kinds) = wrap(model), kinds_of(24)
    probes = concept_depth.fit(lm, rows, labels=kinds, folds=3, strength=0.5)
    read = probes.read(lm, rows)
    with torch.no_grad():
        states = np.stack(
            [
                torch.stack(model(torch.tensor([r]), output_hidden_states=True).hidden_states)[
                    :3, 0, -1
                ]
                for r in rows
            ]
        )
    for depth in range(3):  # the last of Hugging Face's has passed the final norm
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000)).fit(
            states[:, depth], kinds
        )
        expected = plain.predict_proba(states[:, depth])[:, 1]
        np.testing.assert_allclose(read.values[:, depth], expected, atol=1e-3)
    probes.save(tmp_path / "probes")
    again = concept_depth.Probes.load(tmp_path / "probes")
    assert again.result.identical(probes.result)
    assert again.read(lm, rows).identical(read)


def test_the_same_seed_and_no_other_gives_the_same() -> None:
    lm, (rows, kinds) = wrap(tiny.model("llama")), kinds_of(24)
    before = torch.get_rng_state()
    one, two, other = (
        concept_depth.fit(lm, rows, labels=kinds, folds=3, seed=seed) for seed in (0, 0, 1)
    )
    assert one.result.identical(two.result)
    assert torch.equal(one.weight, other.weight)  # the final probes learn from all texts
    assert not torch.equal(one.null_correct, other.null_correct)
    assert torch.equal(before, torch.get_rng_state())


def test_a_constant_dimension_divides_by_nothing() -> None:
    x = np.zeros((8, 3))
    x[:, 1] = np.arange(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight, bias = concept_depth._line(x, (np.arange(8) > 3).astype(int), 1.0)
    assert weight[0] == weight[2] == 0
    assert -bias / weight[1] == pytest.approx(3.5)


def test_twins_are_held_out_together_or_refused() -> None:
    """Each text twice, once with each label: the probe that has seen one twin is wrong about the
    other. Held out together, one of each pair is right: exactly half, whatever the probe."""
    rows = [[5, subject] for subject in range(10, 50) for _ in (0, 1)]
    kinds, groups = [0, 1] * 40, [f"subject {row[1]}" for row in rows]
    lm = wrap(tiny.model("llama"))
    with pytest.raises(InputError, match=r"right for 0.*Name with `groups=`"):
        concept_depth.fit(lm, rows, labels=kinds, strength=1.0)
    parts = concept_depth._parts(np.array(kinds), groups, 5, 0)
    for known, asked in parts:
        assert not {groups[i] for i in known} & {groups[i] for i in asked}
    assert sorted(i for _, asked in parts for i in asked) == list(range(len(rows)))
    found = concept_depth.fit(lm, rows, labels=kinds, groups=groups, strength=1.0)
    assert (found.result.accuracy == 0.5).all()
    assert found.settings["groups"] == 40


def test_refusals() -> None:
    lm, (rows, kinds) = wrap(tiny.model("llama")), kinds_of(24)
    for labels in ([0] * 24, [*kinds[:-1], 2], kinds[:5]):
        with pytest.raises(InputError, match="labels"):
            concept_depth.fit(lm, rows, labels=labels)
    with pytest.raises(InputError, match="folds=1"):
        concept_depth.fit(lm, rows, labels=kinds, folds=1)
    for groups in ([0] * 24, list(range(5))):
        with pytest.raises(InputError, match="groups name"):
            concept_depth.fit(lm, rows, labels=kinds, groups=groups, folds=3)
    with pytest.raises(InputError, match="one kind alone"):
        concept_depth.fit(lm, rows, labels=kinds, groups=kinds, folds=2)
    with pytest.raises(InputError, match="24 labels for 23"):
        concept_depth.fit(lm, rows[:-1], labels=kinds, folds=3)
