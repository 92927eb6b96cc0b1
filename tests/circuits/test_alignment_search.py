"""Directions that carry a variable: planted ones are found, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratoscope.circuits import alignment_search
from stratoscope.errors import InputError, ResultError, SiteError
from stratoscope.models import LM, wrap
from support import tiny
from support.cases import Case
from support.counterfactuals import NO, YES, additive, drawn
from support.subjects import close, lm_of, untouched

SITE = "layers.1.resid_post"
LINE = torch.randn(32, generator=torch.Generator().manual_seed(8))


def _pairs(case: Case) -> list[tuple[list[int], list[int], int]]:
    """Words alone; a classifier has three classes."""
    words = [3, 4, 5, 6, 7] if case.name == "llava" else []  # in a picture's place
    start = len(words)
    rows = zip(case.rows, case.turned)
    both = [([*words, *a[start:]], [*words, *b[start:]], n + 1) for n, (a, b) in enumerate(rows)]
    return both if case.example is None else [both[case.example]]


def anyhow(lm: LM, rank: int = 2) -> alignment_search.Alignment:
    """Some directions at a site of this model."""
    dim, rng = lm.dims.dim, torch.Generator().manual_seed(0)
    found = torch.linalg.qr(torch.randn(dim, rank, generator=rng)).Q
    return alignment_search.Alignment(site=SITE, found=found, settings={}, seed=None, provenance={})


EXAMPLE = {
    "fit": lambda case: {"inputs": _pairs(case), "site": SITE, "rank": 2, "steps": 3},
    "measure": lambda case: {
        "inputs": _pairs(case), "alignment": anyhow(case.lm), "draws": 2,
    },
    "edit": lambda case: {"request": anyhow(case.lm), "between": _pairs(case)},
}  # fmt: skip


def cosine(found: torch.Tensor) -> float:
    """Of the planted direction with the space that was found."""
    return float((found.T @ (LINE / LINE.norm())).norm())


def test_a_planted_direction_is_found_and_a_variable_that_is_not_there_is_not() -> None:
    lm, value = additive(LINE)
    searched, asked = drawn(value, 400, 1), drawn(value, 60, 2)
    with untouched(lm):
        found = alignment_search.fit(lm, searched, site=SITE, steps=150, rate=0.02)
    assert cosine(found.found) > 0.99
    seen = alignment_search.measure(lm, asked, alignment=found)
    assert float(seen.accuracy) == 1
    assert float(seen.whole.mean()) == 1
    chance = float(seen.unchanged.mean())
    assert 0.3 < chance < 0.7
    assert float(seen.null_bound) < chance + 0.1
    assert float(seen.untrained) < 0.6
    # what is asked is a coin, dealt by pair: there is nothing to be found
    rng = torch.Generator().manual_seed(5)
    coins = torch.randint(YES, NO + 1, (460,), generator=rng).tolist()
    dealt = [(*row[:2], coin) for row, coin in zip([*searched, *asked], coins)]
    nothing = alignment_search.fit(lm, dealt[:400], site=SITE, steps=40, untrained=False)
    other = alignment_search.measure(lm, dealt[400:], alignment=nothing)
    assert abs(float(other.accuracy) - 0.5) < 0.15
    assert bool(other.untrained.isnull())


def test_the_number_of_directions_is_found_too() -> None:
    lm, value = additive(LINE)
    found = alignment_search.fit(
        lm, drawn(value, 160, 1), site=SITE, rank=None, steps=300, rate=0.02, untrained=False
    )
    seen = alignment_search.measure(lm, drawn(value, 60, 2), alignment=found, draws=2)
    assert float(seen.accuracy) == 1
    assert found.rank <= 4
    assert cosine(found.found) > 0.98


@torch.no_grad()
def by_hand(
    lm: LM, base: list[int], source: list[int], basis: torch.Tensor, at: int = -1, there: int = -1
) -> torch.Tensor:
    """Last logits with the part interchanged by a plain hook, one pair alone."""
    layer, kept = lm.model.model.layers[1], []

    def change(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor | None:
        if not kept:
            kept.append(out[0, there].clone())
            return None
        out = out.clone()
        out[0, at] += basis @ (basis.T @ (kept[0] - out[0, at]))
        return out

    hook = layer.register_forward_hook(change)
    lm.model(torch.tensor([source]))
    logits = lm.model(torch.tensor([base])).logits[0, -1]
    hook.remove()
    return logits


def test_edit_and_loss_are_those_of_plain_hooks() -> None:
    lm, other, rows = lm_of("llama"), lm_of("llama"), drawn(torch.arange(96.0) - 50, 9, 3)
    start = torch.Generator().manual_seed(4 + 1_000_003)
    basis = torch.linalg.qr(torch.randn(32, 3, generator=start)).Q
    places = {"base": -2, "source": -1}
    made = alignment_search.fit(
        lm, rows, site=SITE, rank=3, positions=places, steps=1, untrained=False, seed=4
    )
    losses = []
    for base, source, answer in rows:
        logits = by_hand(other, base, source, basis, at=-2)
        losses.append(float(-logits.log_softmax(-1)[answer]))
    close(made.curve[0][1], sum(losses) / 9, 1e-5)
    close(made.found.T @ made.found, torch.eye(3), 1e-5)
    with torch.no_grad(), alignment_search.edit(lm, made, between=rows):
        together = lm([base for base, _, _ in rows])["logits"]
    for n, (base, source, _) in enumerate(rows):
        wanted = by_hand(other, base, source, made.found, at=-2)
        close(together[n, len(base) - 1], wanted, 1e-5)
    dicts = [{"base": base, "source": source} for base, source, _ in rows]
    with torch.no_grad(), alignment_search.edit(lm, made, between=dicts):
        close(lm([base for base, _, _ in rows])["logits"], together, 1e-7)


def test_a_folder_is_kept_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    lm, rows = lm_of("llama"), drawn(torch.arange(96.0) - 50, 4, 3)
    made = alignment_search.fit(lm, rows, site=SITE, steps=2, folder=tmp_path)
    again = alignment_search.fit(lm, rows, site=SITE, steps=2, folder=tmp_path)
    assert torch.equal(made.found, again.found)
    assert made.untrained is not None
    assert not torch.equal(made.found, made.untrained)
    with pytest.raises(ResultError, match="another alignment"):
        alignment_search.fit(lm, rows, site=SITE, steps=3, folder=tmp_path)
    with pytest.raises(InputError, match="searched on LlamaForCausalLM"):
        alignment_search.measure(wrap(tiny.model("llama", seed=1)), rows, alignment=tmp_path)
    with pytest.raises(SiteError, match="one vector of a layer stands at each token"):
        alignment_search.fit(lm, rows, site="layers.1.attn.z")
    with pytest.raises(InputError, match="1 to 32 directions"):
        alignment_search.fit(lm, rows, site=SITE, rank=33)
    with pytest.raises(InputError, match="pair 0 is"):
        alignment_search.fit(lm, [rows[0][:2]], site=SITE)
    with pytest.raises(InputError, match="differ in length"):
        alignment_search.fit(lm, rows, site=SITE, positions=None)
