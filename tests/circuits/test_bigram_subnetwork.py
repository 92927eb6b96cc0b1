"""circuits.bigram_subnetwork: the table by hand, the planted table found through the public verb,
and what `measure` says against plain Transformers with plain weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stratoscope.circuits import bigram_subnetwork
from stratoscope.engine import masks
from stratoscope.engine.masks import Mask
from stratoscope.errors import InputError, ResultError, SiteError
from stratoscope.lab.planted.bigram_table import WORDS, bigram_table
from stratoscope.models import LM, wrap
from support.subjects import CORRUPT, ROWS, close, lm_of, padded, untouched

FIT = {"steps": 3, "batch_size": 2}
EXAMPLE = {
    "fit": FIT,
    "measure": lambda case: {
        "mask": half(case.lm),
        "table": bigram_subnetwork.count(case.lm, case.references),
        "other": half(case.lm, 1),
        "draws": 1,
    },
}


def half(lm: LM, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    keep = {
        name: torch.rand(matrix.weight.shape, generator=generator) < 0.5
        for name, matrix in masks.matrices(lm).items()
    }
    return Mask(keep=keep, settings={}, seed=seed, provenance=lm.provenance)


def by_hand(rows: list[list[int]], vocab: int) -> torch.Tensor:
    pairs, single = torch.zeros(vocab, vocab).double(), torch.ones(vocab).double()
    for row in rows:
        for token in row:
            single[token] += 1
        for one, two in pairwise(row):
            pairs[one, two] += 1
    table = (single / single.sum()).repeat(vocab, 1)
    for token in range(vocab):
        if pairs[token].sum():
            table[token] = 0.9 * pairs[token] / pairs[token].sum() + 0.1 * table[token]
    return table


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_table_is_that_of_counting_by_hand(side: str, tmp_path: Path) -> None:
    lm, rows = lm_of("llama"), [[3, 14, 3, 14, 3, 15], [15, 3, 15]]
    made = bigram_subnetwork.count(lm, padded(rows, side))
    expected = by_hand(rows, 96)
    close(made(torch.arange(96)), expected, 1e-6)
    close(made(torch.tensor([[14, 3], [3, 50]])), expected[torch.tensor([[14, 3], [3, 50]])], 1e-6)
    close(made(torch.arange(96)).sum(dim=-1), torch.ones(96), 1e-5)
    made.save(tmp_path)
    again = bigram_subnetwork.Bigrams.load(tmp_path)
    assert again(torch.tensor([3])).equal(made(torch.tensor([3])))
    with pytest.raises(InputError, match="no token follows another"):
        bigram_subnetwork.count(lm, [[3], [4]])


def test_the_correlation_is_pearsons_over_what_both_have() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 7, generator=generator) for _ in range(2))
    one[:, 0], other[1, 5:] = torch.nan, torch.nan
    here = ~(one.isnan() | other.isnan())
    expected = np.corrcoef(one[here], other[here])[0, 1]
    assert bigram_subnetwork.correlation(one, other) == pytest.approx(expected)
    pair = np.corrcoef(one[[2, 0]][here[[2, 0]]], other[[2, 0]][here[[2, 0]]])[0, 1]
    assert bigram_subnetwork.correlation(one, other, [2, 0]) == pytest.approx(pair)
    assert bigram_subnetwork.correlation(one * 0 + 2, other) == 0


def test_the_planted_table_is_found_from_pairs_of_words() -> None:
    """Each word is followed by what the table says; the search is shown every word as often."""
    p = bigram_table(2)
    lm, generator = wrap(p.model), torch.Generator().manual_seed(0)
    words = torch.randint(WORDS, (3000,), generator=generator)
    pairs = torch.stack([words, torch.multinomial(p.table[words], 1, generator=generator)[:, 0]], 1)
    table = bigram_subnetwork.count(lm, pairs[300:].tolist())
    shown, search = words.view(-1, 15).tolist(), {"rate": 0.03, "growth": 1.03, "steps": 120}
    assert lm.dims.vocab == WORDS
    with untouched(lm):
        mask = bigram_subnetwork.fit(lm, shown, table=table, **search)
    own = sum(int((mask.keep[n] & k).sum()) for n, k in p.planted.items())
    assert own >= 0.95 * sum(int(k.sum()) for k in p.planted.values())
    assert mask.kept - own <= 0.05 * (mask.size - own)
    found = bigram_subnetwork.measure(lm, pairs[:300].tolist(), mask=mask, table=table, draws=5)
    assert found.kept.sel(component="attn").sum() == 0
    assert found.correlation_low > 0.95
    assert found.null_correlation.max() < 0.5
    assert found.divergence.mean() < 0.1
    assert found.size.sum() == mask.size


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_what_is_measured_is_what_plain_weights_give(name: str) -> None:
    lm = lm_of(name)
    mask, other = half(lm), half(lm, 1)
    table = bigram_subnetwork.count(lm, CORRUPT)
    with untouched(lm):
        found = bigram_subnetwork.measure(
            lm, padded(ROWS, "left"), mask=mask, table=table, other=other, draws=2
        )
    own = {n: p.clone() for n, p in lm.model.state_dict().items()}
    rival = masks.random_like(mask, 1)  # the second draw
    by_table, sums = by_hand(CORRUPT, 96).log(), {}
    for what, chosen in (("own", mask), ("whole", None), ("null", rival)):
        cut = {n: w * chosen.keep[n] if chosen and n in chosen.keep else w for n, w in own.items()}
        lm.model.load_state_dict(cut)
        sums[what] = [lm.model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    lm.model.load_state_dict(own)
    for example, row in enumerate(ROWS):
        at, near = range(len(row) - 1), by_table[row]
        assert found.surprisal[example, 0].isnull()
        for words, log in (("surprisal", "own"), ("whole_surprisal", "whole")):
            nats = -sums[log][example][at, row[1:]]
            close(found[words][example, 1 : len(row)], nats, 1e-4)
        close(found.table_surprisal[example, 1 : len(row)], -near[at, row[1:]], 1e-5)
        for words, log in (("divergence", "own"), ("whole_divergence", "whole")):
            apart = (near.exp() * (near - sums[log][example])).sum(dim=-1).mean()
            close(found[words][example], apart, 1e-4)
    expected = {
        what: np.corrcoef(
            *(
                np.concatenate([-said[row[0]][range(len(ids) - 1), ids[1:]] for row, ids in rows])
                for said in (one, [by_table[ids] for ids in ROWS])
                for rows in [[((n,), ids) for n, ids in enumerate(ROWS)]]
            )
        )[0, 1]
        for what, one in sums.items()
    }
    assert found.correlation == pytest.approx(expected["own"], abs=1e-5)
    assert found.whole_correlation == pytest.approx(expected["whole"], abs=1e-5)
    assert found.null_correlation[1] == pytest.approx(expected["null"], abs=1e-5)
    assert np.isnan(found.correlation_low)  # two texts are no forty
    assert float(found.overlap) == masks.shared(mask, other)
    layer = [int(k.sum()) for n, k in mask.keep.items() if ".1." in n and "mlp" in n]
    assert found.kept.sel(layer=1, component="mlp") == sum(layer)


def test_a_folder_keeps_the_fit_and_no_other(tmp_path: Path) -> None:
    lm = lm_of("llama")
    first = bigram_subnetwork.fit(lm, ROWS, **FIT, folder=tmp_path / "mask")
    again = bigram_subnetwork.fit(lm, ROWS, **FIT, folder=tmp_path / "mask")
    assert all(again.keep[n].equal(keep) for n, keep in first.keep.items())
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]
    assert not [*(tmp_path / "mask").glob(".making*")]
    table = bigram_subnetwork.count(lm, CORRUPT)
    for other in ({"seed": 1}, {"sparsity": 3.0}, {"table": table}):
        with pytest.raises(ResultError, match="holds another mask"):
            bigram_subnetwork.fit(lm, ROWS, **FIT, **other, folder=tmp_path / "mask")
    table.save(tmp_path / "table")
    found = bigram_subnetwork.measure(
        lm, ROWS, mask=str(tmp_path / "mask"), table=str(tmp_path / "table"), draws=0
    )
    assert int(found.kept.sum()) == first.kept


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="batch_size=8 of 2 windows"):
        bigram_subnetwork.fit(lm, ROWS, steps=1)
    given = {"mask": half(lm), "table": bigram_subnetwork.count(lm, ROWS), "draws": 0}
    with pytest.raises(InputError, match=r"texts \[1\] have one token"):
        bigram_subnetwork.measure(lm, [[3, 4], [5]], **given)
    with pytest.raises(InputError, match="mask is of another model"):
        bigram_subnetwork.measure(lm, ROWS, **(given | {"mask": half(lm_of("gpt2"))}))
    with pytest.raises(SiteError, match="does not predict the next token"):
        bigram_subnetwork.fit(lm_of("bert"), ROWS, **FIT)
