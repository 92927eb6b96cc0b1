"""Streams: their best predictors against what follows in very many rows, and against integrals;
splits, chance and pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from scipy.integrate import quad

from stratoscope.errors import InputError
from stratoscope.lab import synthetic
from stratoscope.lab.synthetic import markov
from stratoscope.lab.synthetic._stream import NO_TARGET, Stream

SMALL: dict[str, dict[str, Any]] = {
    "markov": {"states": 2, "length": 5, "concentration": 0.7},
    "recall": {"keys": 3, "values": 2, "pairs": 2, "queries": 2},
    "copying": {"symbols": 3, "length": 2},
    "features": {"kinds": ("xor", "linear"), "noise": 0},
}
USUAL: dict[str, Callable[..., Stream]] = {
    name: getattr(synthetic, name).stream for name in synthetic.names()
}


def test_every_stream_is_tested_here() -> None:
    assert set(synthetic.names()) == set(SMALL)


@pytest.mark.parametrize("name", synthetic.names())
def test_the_best_predictor_says_what_follows(name: str) -> None:
    """Of 60,000 rows: how often each token follows each prefix, within five standard errors; and
    so, no other predictor loses less."""
    stream = USUAL[name](**SMALL[name])
    ids = stream.draw(torch.Generator().manual_seed(1), 60_000)
    said = stream.optimal(ids)
    met = 0
    for place in torch.nonzero(stream.queried)[:, 0].tolist():
        prefixes, which = torch.unique(ids[:, :place], dim=0, return_inverse=True)
        follows = torch.zeros(len(prefixes), stream.vocab)
        follows.index_put_((which, ids[:, place]), torch.ones(len(ids)), accumulate=True)
        n = follows.sum(dim=1, keepdim=True)
        # each prefix has one prediction, whatever comes later in its row
        own = torch.zeros_like(follows).index_copy_(0, which, said[:, place - 1])
        assert torch.equal(own[which], said[:, place - 1])
        assert torch.allclose(own.sum(dim=1), torch.ones(len(own)))
        error = (own * (1 - own) / n).sqrt()
        assert ((follows / n - own).abs() <= 5 * error + 1e-6).all()
        met += len(prefixes)
    assert met > 10


def test_transitions_are_integrated_out() -> None:
    """Two states: the posterior mean by numerical integration over the transition's chance."""
    a = 0.7
    for prefix in product((0, 1), repeat=5):
        pairs = list(pairwise(prefix))
        stay, leave = (
            sum(p == (prefix[-1], to) for p in pairs) for to in (prefix[-1], 1 - prefix[-1])
        )
        weight = lambda p, more=0, s=stay, m=leave: (  # noqa: E731
            p ** (s + a - 1 + more) * (1 - p) ** (m + a - 1)
        )
        expected = quad(weight, 0, 1, args=(1,))[0] / quad(weight, 0, 1)[0]
        found = markov.bigrams(torch.tensor([prefix]), 2, a)[0, -1, prefix[-1]].item()
        assert found == pytest.approx(expected, abs=1e-4)


def test_other_predictors_of_a_chain_are_worse() -> None:
    stream = markov.stream(seed=0)
    batch = stream.batch(0, 256)
    floor, accuracy = stream.floor(batch)
    at = torch.arange(1, 64)
    answers = batch["input_ids"][:, 1:]
    for concentration in (0.03, 3.0):
        said = markov.bigrams(batch["input_ids"], 8, concentration)[:, at - 1]
        assert -said.gather(-1, answers[..., None]).log().mean().item() > floor + 0.02
    once = torch.nn.functional.one_hot(batch["input_ids"], 8).cumsum(dim=1) + 0.3
    unigrams = once / once.sum(dim=-1, keepdim=True)
    assert -unigrams[:, :-1].gather(-1, answers[..., None]).log().mean().item() > floor + 0.1
    assert (unigrams[:, :-1].argmax(-1) == answers).float().mean().item() < accuracy - 0.1


@pytest.mark.parametrize("name", synthetic.names())
def test_a_batch_is_a_function_of_seed_split_and_step(name: str) -> None:
    one, same = USUAL[name](seed=3), USUAL[name](seed=3)
    batch = one.batch(5, 16)
    assert torch.equal(batch["input_ids"], same.batch(5, 16)["input_ids"])
    for other in (one.batch(6, 16), USUAL[name](seed=4).batch(5, 16)):
        assert not torch.equal(batch["input_ids"], other["input_ids"])
    asked = batch["labels"] != NO_TARGET
    assert torch.equal(batch["labels"][asked], batch["input_ids"][asked])
    assert (asked == one.queried).all()
    assert batch["input_ids"].shape == (16, one.length)
    assert int(batch["input_ids"].max()) < one.vocab


@pytest.mark.parametrize("name", synthetic.names())
def test_no_row_is_in_two_splits(name: str) -> None:
    """Of very small streams, whose rows come again and again."""
    rows: dict[str, set[tuple[int, ...]]] = {}
    settings = SMALL[name] | ({"length": 6} if name == "markov" else {})
    settings |= {"symbols": 4, "length": 3} if name == "copying" else {}
    for split in ("train", "validation", "test"):
        stream = USUAL[name](split=split, **settings)
        rows[split] = {tuple(row) for row in stream.batch(0, 300)["input_ids"].tolist()}
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]
    assert not rows["test"] & rows["validation"]


@pytest.mark.parametrize("name", synthetic.names())
def test_chance_is_what_a_constant_answer_gets(name: str) -> None:
    stream = USUAL[name]()
    labels = torch.cat([stream.batch(step, 256)["labels"] for step in range(4)])
    answers = labels[labels != NO_TARGET]
    share = torch.bincount(answers).float() / len(answers)
    assert share.max().item() == pytest.approx(stream.chance, abs=0.02)
    _, accuracy = stream.floor(stream.batch(0, 64))
    assert accuracy > min(2 * stream.chance, 0.99)  # of two answers chance is a half


@pytest.mark.parametrize("name", synthetic.names())
def test_pairs_are_decided_by_what_differs(name: str) -> None:
    stream = USUAL[name](split="test")
    task = stream.pairs(12, seed=2)
    assert task == stream.pairs(12, seed=2)
    for clean, corrupt, answer, foil in zip(
        task.clean, task.corrupt, task.answer_ids, task.foil_ids
    ):
        assert len(clean) == len(corrupt)
        assert answer != foil
        said, instead = (stream.optimal(torch.tensor([ids]))[0, -1] for ids in (clean, corrupt))
        assert int(said.argmax()) == answer
        assert int(instead.argmax()) == foil


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="queries <= pairs <= keys"):
        synthetic.recall.stream(pairs=4, queries=5)
    with pytest.raises(InputError, match="too few different rows"):
        synthetic.copying.stream(split="test", symbols=1, length=1).batch(0, 8)
    exam = replace(synthetic.copying.stream(), split="exam")
    with pytest.raises(InputError, match="choose one of test, validation, train"):
        exam.batch(0, 1)
    with pytest.raises(InputError, match="two states"):
        synthetic.markov.stream(states=1)
    with pytest.raises(InputError, match="at least one"):
        synthetic.copying.stream().pairs(0, 1)
