"""Shapley values: closed forms, every subset by plain Hugging Face, planted models, and the sum
that always holds."""

from __future__ import annotations

from itertools import permutations as every_order

import numpy as np
import pytest
import torch
from torch import Tensor

from stratoscope.engine.metric import target
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.tokens import _kinds, shapley
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
WHOLE_ANSWER = {"permutations": 2}

ANSWER, FOIL = 5, 60
WORDS = {"answer": ANSWER, "foil": FOIL}
NAMES = ("copy_head", "induction", "induction_gpt2", "fact_lookup", "fact_lookup_moved", "two_hop")


def game(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2**n, generator=torch.Generator().manual_seed(seed)).double()


def by_orders(value: Tensor, n: int) -> Tensor:
    """The definition: the mean over all orders of what each token adds."""
    total = torch.zeros(n).double()
    orders = list(every_order(range(n)))
    for order in orders:
        there = 0
        for i in order:
            total[i] += value[there | 1 << i] - value[there]
            there |= 1 << i
    return total / len(orders)


def test_an_additive_game_gives_each_token_its_own_part() -> None:
    part = torch.tensor([3.0, -1.0, 0.0, 0.25]).double()
    value = torch.stack(
        [sum((part[i] for i in range(4) if s >> i & 1), torch.tensor(2.0)) for s in range(16)]
    )
    assert torch.allclose(shapley.exact(value), part)
    order = torch.tensor([[2, 0, 3, 1]])
    came = torch.tensor([[2.0, 2.0, 5.0, 5.25, 4.25]]).double()
    assert torch.allclose(shapley.marginals(order, came), part)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_subsets_equal_the_mean_over_all_orders(n: int) -> None:
    value = game(n)
    assert torch.allclose(shapley.exact(value), by_orders(value, n))
    assert torch.allclose(shapley.exact(value).sum(), value[-1] - value[0])


def difference(lm: LM, row: list[int], blank: Tensor, gone: list[int]) -> float:
    """By plain Hugging Face, with the embeddings at `gone` replaced by `blank` (position, dim)."""
    x = lm.model.get_input_embeddings()(torch.tensor([row])).detach().clone()
    x[0, gone] = blank[gone]
    with torch.no_grad():
        logits = lm.model(inputs_embeds=x).logits[0, -1]
    return float(logits[ANSWER] - logits[FOIL])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("absent", ["mean", "zero", 7])
def test_all_subsets_equal_plain_hugging_face(model: str, absent: str | int) -> None:
    lm, row = lm_of(model), ROWS[1]
    n = len(row)
    table = lm.model.get_input_embeddings().weight.detach()
    blank = {"mean": table.mean(dim=0), "zero": 0 * table[0], 7: table[7]}[absent].expand(n, -1)
    value = [
        difference(lm, row, blank, [p for p in range(n) if not s >> p & 1]) for s in range(2**n)
    ]
    expected = by_orders(torch.tensor(value).double(), n)
    found = shapley.measure(lm, row, absent=absent, permutations="all", **WORDS)
    close(found.attribution.values[0], expected.numpy(), 1e-3)
    assert (found.standard_error.values == 0).all()
    assert int(found.passes[0]) == 2**n
    sampled = shapley.measure(lm, row, absent=absent, permutations=120, **WORDS)
    error = sampled.attribution.values[0] - expected.numpy()
    assert (abs(error) < 4 * sampled.standard_error.values[0] + 1e-4).all()
    assert 0 < sampled.standard_error.values.max() < 0.2 * abs(expected).max()


def test_words_of_their_kind_stand_for_absent_tokens() -> None:
    """One pair of orders: the two walks are taken by plain Hugging Face, with the words that were
    drawn."""
    lm, row = lm_of("llama"), ROWS[1]
    n = len(row)
    batch = lm.batch([row])
    [[drawn]] = _kinds.words(lm, batch, 1, 3, target(lm, batch, ANSWER, FOIL)).tolist()
    assert all(word not in (ANSWER, FOIL, own) for word, own in zip(drawn, row))
    blank = lm.model.get_input_embeddings()(torch.tensor(drawn)).detach()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3)).tolist()
    expected = torch.zeros(n)
    for one in (order, order[::-1]):
        value = [difference(lm, row, blank, one[k:]) for k in range(n + 1)]
        for k, i in enumerate(one):
            expected[i] += (value[k + 1] - value[k]) / 2
    found = shapley.measure(lm, row, permutations=2, seed=3, **WORDS)
    close(found.attribution.values[0], expected.numpy(), 1e-3)
    assert np.isnan(found.standard_error.values).all()  # one pair has no spread


def test_the_standard_error_is_of_the_mean_over_pairs() -> None:
    """Two pairs of orders, walked by plain Hugging Face: half of what they differ by."""
    lm, row = lm_of("llama"), ROWS[1]
    n, blank = len(row), torch.zeros(len(row), 32)
    generator, pairs = torch.Generator().manual_seed(3), []
    for _ in range(2):
        order, added = torch.randperm(n, generator=generator).tolist(), torch.zeros(n)
        for one in (order, order[::-1]):
            value = [difference(lm, row, blank, one[k:]) for k in range(n + 1)]
            for k, i in enumerate(one):
                added[i] += (value[k + 1] - value[k]) / 2
        pairs.append(added)
    found = shapley.measure(lm, row, absent="zero", permutations=4, seed=3, **WORDS)
    close(found.attribution.values[0], ((pairs[0] + pairs[1]) / 2).numpy(), 1e-3)
    close(found.standard_error.values[0], ((pairs[0] - pairs[1]).abs() / 2).numpy(), 1e-3)


@pytest.mark.parametrize("absent", ["kind", "mean"])
def test_they_sum_to_the_difference_in_any_batch(absent: str) -> None:
    lm = lm_of("gpt2")
    with untouched(lm):
        both = shapley.measure(lm, padded(ROWS, "left"), absent=absent, permutations=4, **WORDS)
    for e, row in enumerate(ROWS):
        alone = shapley.measure(lm, [row], absent=absent, permutations=4, **WORDS)
        n = len(row)
        for name in ("attribution", "standard_error"):
            close(both[name].values[e, :n], alone[name].values[0], 1e-3)
            assert np.isnan(both[name].values[e, n:]).all()
        rise = float(both.logit_difference[e] - both.absent_difference[e])
        close(float(both.attribution[e].sum()), rise, 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_planted_positions_lead(name: str) -> None:
    p: planted.Planted = getattr(planted, name)()
    lm = wrap(p.model, p.tokenizer)
    for absent in ("kind", "mean"):
        found = shapley.measure(
            lm, p.clean, answer=p.answer, foil=p.foil, absent=absent, permutations=64
        )
        size = abs(found.attribution.values[0])
        order = [int(i) for i in np.argsort(-size)]
        assert set(order[: len(p.positions)]) == set(p.positions), absent
        rest = [i for i in range(len(size)) if i not in p.positions]
        assert size[rest].max() < 0.3 * size.max(), absent


def test_a_special_token_is_always_there() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    ids = p.tokenizer(p.clean)["input_ids"]
    [mark] = p.tokenizer.all_special_ids
    found = shapley.measure(lm, [[mark, *ids]], answer=p.answer, foil=p.foil, permutations=2)
    assert found.attribution.values[0, 0] == 0
    assert abs(found.attribution.values[0, 1:]).max() > 0
    alone = shapley.measure(lm, [[mark]], answer=p.answer, foil=p.foil, permutations=2)
    assert alone.attribution.values.tolist() == [[0.0]]


def test_what_is_asked_is_never_put_in_and_no_word_comes_twice() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    ids = p.tokenizer(p.clean)["input_ids"]
    found = _kinds.pools(lm, ids)
    for token, kind in found.items():
        assert len(kind)
        assert not {token, *p.tokenizer.all_special_ids} & set(kind.tolist())
    batch = lm.batch([ids])
    asked = target(lm, batch, p.answer, p.foil)
    never = {int(asked.answer[0]), int(asked.foil[0])}
    left = set(found[ids[0]].tolist()) - never
    rows = _kinds.words(lm, batch, len(left), 0, asked)
    assert not never & set(rows[:, 0].flatten().tolist()) - set(ids)
    assert set(rows[:, 0, 0].tolist()) == left  # none twice while the kind lasts


def test_refusals() -> None:
    lm = lm_of("llama")
    for bad in (0, 3, -2):
        with pytest.raises(InputError, match="even number"):
            shapley.measure(lm, ROWS, permutations=bad)
    with pytest.raises(InputError, match="one game"):
        shapley.measure(lm, ROWS, permutations="all")
    with pytest.raises(InputError, match="2048 subsets; give at most 10"):
        shapley.measure(lm, [list(range(11))], absent="mean", permutations="all")
