"""Units that carry a variable: a planted dimension, a planted head, a planted direction."""

from __future__ import annotations

import pytest
import torch

from stratoscope.circuits import alignment_search, binary_mask
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.cases import Case
from support.counterfactuals import additive, drawn
from support.subjects import close

SITE = "layers.1.resid_post"


def _pairs(case: Case) -> list[tuple[list[int], list[int], int]]:
    words = [3, 4, 5, 6, 7] if case.name == "llava" else []  # in a picture's place
    start = len(words)
    rows = zip(case.rows, case.turned)
    return [([*words, *a[start:]], [*words, *b[start:]], n + 1) for n, (a, b) in enumerate(rows)]


EXAMPLE = {
    "fit": lambda case: {
        "inputs": _pairs(case), "site": SITE, "steps": 3, "sparsity": 0.0, "rate": 0.5,
    }
}  # fmt: skip


def test_a_planted_dimension_is_the_one_that_is_kept() -> None:
    lm, value = additive(torch.eye(32)[5])
    found = binary_mask.fit(lm, drawn(value, 200, 1), site=SITE, steps=100, untrained=False)
    assert found.found.tolist() == [5]
    seen = alignment_search.measure(lm, drawn(value, 60, 2), alignment=found, draws=5)
    assert float(seen.accuracy) == 1
    assert float(seen.null.max()) < 0.75
    with pytest.raises(InputError, match=r"no unit of .* is worth its price"):
        binary_mask.fit(lm, drawn(value, 32, 1), site=SITE, steps=40, sparsity=1e4)


def test_a_planted_direction_among_others_is_the_one_that_is_kept() -> None:
    rng = torch.Generator().manual_seed(2)
    turned = torch.linalg.qr(torch.randn(32, 32, generator=rng)).Q
    lm, value = additive(turned[7])
    found = binary_mask.fit(
        lm, drawn(value, 200, 1), site=SITE, directions=turned, steps=100, untrained=False
    )
    assert torch.equal(found.found[:, 0], turned[7])
    assert found.rank == 1
    with pytest.raises(InputError, match="orthonormal rows"):
        binary_mask.fit(lm, drawn(value, 20, 1), site=SITE, directions=2 * turned)


def test_a_planted_head_is_the_one_that_is_kept() -> None:
    one = planted.copy_head()
    [(layer, head)] = one.heads
    lm = wrap(one.model, one.tokenizer)
    rows = [(v.clean, v.corrupt, v.foil) for v in one.variants(120, seed=1)]
    found = binary_mask.fit(
        lm, rows[:90], site=f"layers.{layer}.attn.z", sparsity=0.1, steps=60, untrained=False
    )
    assert found.found.tolist() == [head]
    seen = alignment_search.measure(lm, rows[90:], alignment=found, draws=4)
    assert float(seen.accuracy) == 1
    assert float(seen.unchanged.mean()) == 0
    with alignment_search.edit(lm, found, between=rows[90:94]):
        logits = lm([base for base, _, _ in rows[90:94]])["logits"]
    last = lm.batch([base for base, _, _ in rows[90:94]]).lengths - 1
    words = [lm.tokenizer.decode(row[at].argmax()) for row, at in zip(logits, last)]
    assert words == [foil for _, _, foil in rows[90:94]]


def test_a_mask_grows_cold() -> None:
    """Half of each unit at first, then sigmoid(s / T) with T falling from 1 to 0.01."""
    mask = binary_mask.Mask(3, None)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([-1.0, 0.0, 0.02]))
    base, source = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    for along, heat in ((0.0, 1.0), (0.5, 0.1), (1.0, 0.01)):
        wanted = 1 / (1 + torch.exp(torch.tensor([1.0, 0.0, -0.02]) / heat))
        close(mask(base, source, along).detach().flatten(), wanted, 1e-6)
