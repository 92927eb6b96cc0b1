"""engine.mask_search: its gradient, its end, a planted table that it must find and a search for
something else that must not, and a search that is killed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from stratoscope.engine import mask_search, masks
from stratoscope.engine.mask_search import Scores, Target, train_mask
from stratoscope.engine.masks import Mask
from stratoscope.engine.train import train
from stratoscope.errors import InputError, SiteError
from stratoscope.lab.planted.bigram_table import WORDS, BigramTable, bigram_table
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, untouched


def search(p: BigramTable, target: Target, **options: object) -> Mask:
    rows = torch.randint(WORDS, (64, 16), generator=torch.Generator().manual_seed(1))
    return train_mask(
        wrap(p.model),
        lambda step: rows[torch.arange(8 * step, 8 * step + 8) % 64].tolist(),
        target,
        **({"rate": 0.03, "growth": 1.02, "steps": 200} | options),
    )


def found(p: BigramTable, mask: Mask) -> tuple[float, float]:
    """The share of the planted weights that are kept, and of the others."""
    pairs = [(mask.keep[name].flatten(), own.flatten()) for name, own in p.planted.items()]
    keep, own = (torch.cat(column) for column in zip(*pairs))
    return float(keep[own].float().mean()), float(keep[~own].float().mean())


def test_the_planted_table_is_found_and_the_noise_is_not() -> None:
    p = bigram_table(3)
    mask = search(p, lambda ids: p.table[ids])
    planted, noise = found(p, mask)
    assert planted >= 0.95
    assert noise <= 0.05
    assert mask.story["undecided"] < 0.01
    for draw in range(5):
        assert found(p, masks.random_like(mask, draw))[0] < 0.2
    with masks.applied(wrap(p.model), mask):
        said = p.model(torch.arange(WORDS)[:, None]).logits[:, 0].log_softmax(dim=-1)
    assert (p.table * (p.table.log() - said)).sum(dim=-1).mean() < 0.01


def test_searched_for_the_next_word_of_random_texts_it_is_not_found() -> None:
    p = bigram_table()

    def following(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids.roll(-1, 1), WORDS).float()

    assert found(p, search(p, following))[0] < 0.2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    lm = lm_of(name)
    model = lm.model.double()
    try:
        every = masks.matrices(lm)
        generator = torch.Generator().manual_seed(0)
        s = {n: torch.randn(m.weight.shape, generator=generator).double() for n, m in every.items()}
        target = torch.rand(2, 8, 96, generator=generator).softmax(dim=-1).double()
        real = lm.batch(ROWS).text[1]

        def loss(scores: dict[str, torch.Tensor]) -> torch.Tensor:
            given = {n: torch.sigmoid(3 * x) for n, x in scores.items()}
            logits = mask_search.masked_logits(lm, ROWS, given)
            return mask_search.cross_entropy(logits, target, real)

        leaves = {n: x.clone().requires_grad_() for n, x in s.items()}
        slopes = dict(zip(leaves, torch.autograd.grad(loss(leaves), [*leaves.values()])))
        for n in [*every][:: len(every) // 4]:  # llama's norms round to float32: a long way
            ends = [
                float(loss({**s, n: s[n] + step * slopes[n].sign()}).detach())
                for step in (1e-2, -1e-2)
            ]
            slope = float(slopes[n].abs().sum())
            assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope, rel=1e-3)
    finally:
        model.float()


def test_padding_takes_no_part_and_the_loss_is_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    real = torch.tensor([[True] * 3, [True, False, False]])
    expected = torch.nn.functional.cross_entropy(logits[real], target.softmax(-1)[real])
    close(mask_search.cross_entropy(logits, target.softmax(-1), real), expected, 1e-6)


def test_it_ends_when_almost_all_are_decided() -> None:
    scores = Scores([torch.zeros(20, 20)])
    assert not scores.settled(1.0)
    with torch.no_grad():
        scores.each[0][:] = -1.0
        scores.each[0][:10] = 1.0
        scores.each[0][0, :2] = 0.0
    assert scores.undecided(2.0).tolist() == [400, 0]
    assert scores.undecided(3.0).tolist() == [2, 198]
    assert not scores.settled(3.0)  # 2 of 198 are more than a hundredth
    with torch.no_grad():
        scores.each[0][0, 0] = -1.0
    assert scores.settled(3.0)
    assert not scores.settled(2.0)


class Killed(Exception):
    pass


def test_a_search_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = bigram_table(5)
    whole = search(p, lambda ids: p.table[ids], steps=12)
    monkeypatch.setattr(mask_search, "train", partial(train, every=0.0))
    calls = 0

    def breaks(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Killed
        return p.table[ids]

    with untouched_model(p), pytest.raises(Killed):
        search(p, breaks, steps=12, folder=tmp_path)
    again = search(p, breaks, steps=12, folder=tmp_path)
    assert calls == 8 + 12 - 7  # seven steps were kept
    assert all(again.keep[name].equal(keep) for name, keep in whole.keep.items())
    assert again.story["curve"][-1] == whole.story["curve"][-1]


def untouched_model(p: BigramTable):
    lm = wrap(p.model)
    assert lm.dims.vocab == WORDS
    return untouched(lm)


def test_refusals() -> None:
    lm, target = lm_of("llama"), lambda ids: torch.full((*ids.shape, 96), 1 / 96)
    for wrong in ({"steps": 0}, {"sparsity": -1.0}, {"rate": 0.0}, {"growth": 0.9}):
        with pytest.raises(InputError, match="one step at least"):
            train_mask(lm, lambda step: ROWS, target, **wrong)
    with untouched(lm), pytest.raises(InputError, match="lower the rate"):
        train_mask(lm, lambda step: ROWS, lambda ids: target(ids) * torch.nan, steps=2)
    with pytest.raises(SiteError, match="does not predict the next token"):
        train_mask(lm_of("bert"), lambda step: ROWS, target)
