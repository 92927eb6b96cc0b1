"""engine.masks: which matrices there are, what a mask does to plain weights, and masks to compare
with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stratoscope.engine import masks
from stratoscope.engine.masks import Mask
from stratoscope.errors import InputError, SiteError
from stratoscope.models import LM, wrap
from support import tiny, zoo
from support.subjects import ROWS, lm_of, untouched


def some(lm: LM, share: float = 0.5, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    keep = {
        name: torch.rand(matrix.weight.shape, generator=generator) < share
        for name, matrix in masks.matrices(lm).items()
    }
    return Mask(keep=keep, settings={}, seed=seed, provenance=lm.provenance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "gpt_neox", "mixtral", "llava"])
def test_every_matrix_of_the_layers_and_no_other(name: str) -> None:
    lm = wrap(tiny.model(name))
    found = masks.matrices(lm)
    inside = {"llava": "language_model.layers."}.get(name, "layer" if name != "gpt2" else ".h.")
    expected = {
        n
        for n, p in lm.model.named_parameters()
        if p.ndim >= 2 and inside in n and not any(w in n for w in ("vision", "embed", "norm"))
    }
    assert {*found} == expected
    for n, matrix in found.items():
        assert (matrix.component == "attn") == ("att" in n.lower()), n
        assert f".{matrix.layer}." in n
        assert matrix.weight is dict(lm.model.named_parameters())[n]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_not_kept_is_zero_and_nothing_else_is_touched(name: str) -> None:
    lm = lm_of(name)
    mask, own = some(lm), dict(lm.model.named_parameters())
    before = {n: p.detach().clone() for n, p in own.items()}
    with untouched(lm):
        for invert in (False, True):
            with masks.applied(lm, mask, invert=invert):
                for n, weight in own.items():
                    keep = mask.keep[n] ^ invert if n in mask.keep else torch.ones(())
                    assert weight.equal(before[n] * keep), n
    for n, keep in mask.keep.items():  # kept and inverted hold every weight once
        assert torch.equal(before[n] * keep + before[n] * ~keep, before[n])


def test_a_mask_of_ones_changes_not_a_bit_and_leaves_no_delta() -> None:
    lm = lm_of("llama")
    mask, plain = some(lm, 2.0), lm(ROWS)["logits"]
    assert mask.kept == mask.size == sum(m.weight.numel() for m in masks.matrices(lm).values())
    edit = masks.applied(lm, mask)
    assert edit.deltas == {}
    with edit:
        assert lm(ROWS)["logits"].equal(plain)
    assert (
        not masks.applied(lm, mask, invert=True)
        .deltas["model.layers.0.mlp.up_proj.weight"]
        .eq(0)
        .all()
    )


def test_saved_and_loaded(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    mask = some(lm, 0.2)
    mask.save(tmp_path)
    again = Mask.load(tmp_path)
    assert again.keep.keys() == mask.keep.keys()
    assert all(again.keep[n].equal(keep) for n, keep in mask.keep.items())
    assert repr(again) == f"Mask({mask.kept:,} of {mask.size:,} weights kept)"


def test_rivals_have_as_many_weights_in_every_matrix() -> None:
    lm = lm_of("llama")
    mask = some(lm, 0.1)
    weights = {n: m.weight.detach() for n, m in masks.matrices(lm).items()}
    random, again = (masks.random_like(mask, seed) for seed in (1, 2))
    largest = masks.largest_like(lm, mask)
    for n, keep in mask.keep.items():
        for rival in (random, again, largest):
            assert rival.keep[n].sum() == keep.sum()
            assert rival.keep[n].shape == keep.shape
        size = weights[n].abs()
        assert size[largest.keep[n]].min() > size[~largest.keep[n]].max()
    assert masks.shared(random, again) < 0.2
    assert masks.shared(random, masks.random_like(mask, 1)) == 1


def test_what_two_masks_share_and_what_chance_would() -> None:
    shape = {"a": torch.zeros(4, 5, dtype=torch.bool), "b": torch.zeros(10, dtype=torch.bool)}
    one, other = (
        Mask(keep={n: k.clone() for n, k in shape.items()}, settings={}, seed=0, provenance={})
        for _ in range(2)
    )
    one.keep["a"][0], one.keep["b"][:5] = True, True
    other.keep["a"][0, :2], other.keep["b"][4:8] = True, True
    assert masks.shared(one, other) == 3 / 10
    assert masks.shared(other, one) == 3 / 6
    drawn = masks.chance_shared(one, other, draws=20_000)
    assert drawn.mean() == pytest.approx((5 * 2 / 20 + 5 * 4 / 10) / 10, abs=3e-3)
    variance = sum(
        k * (m / n) * (1 - m / n) * (n - k) / (n - 1) for k, m, n in ((5, 2, 20), (5, 4, 10))
    )
    assert np.var(drawn) == pytest.approx(variance / 100, rel=0.05)
    nothing = Mask(keep=shape, settings={}, seed=0, provenance={})
    with pytest.raises(InputError, match="must keep something"):
        masks.shared(nothing, one)


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="mask is of another model"):
        masks.applied(lm, some(lm_of("gpt2")))
    with pytest.raises(SiteError, match="does not exist on"):
        masks.matrices(zoo.lm("jamba"))
