"""A fit is the harvest learnt from; it stays where it was put, and says more after more steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stratoscope.engine.harvest import harvest
from stratoscope.engine.sparse import learn
from stratoscope.errors import InputError, ResultError
from stratoscope.features import fidelity, sae
from support.cases import Case
from support.subjects import lm_of, untouched

SITE = "layers.1.resid_post"
RNG = torch.Generator().manual_seed(2)
TEXTS = [torch.randint(3, 96, (40,), generator=RNG).tolist() for _ in range(30)]


def _rows(case: Case) -> list[list[int]]:
    """Words alone: a picture's places are no text to harvest."""
    return [row[5:] if case.name == "llava" else row for row in case.rows] * 3


EXAMPLE = {
    "fit": lambda case: {
        "inputs": _rows(case), "site": SITE.replace("1", "0"), "tokens": 18, "width": 8,
        "sparsity": 2, "steps": 4, "batch_size": 6,
    }
}  # fmt: skip


def test_it_is_the_harvest_learnt_from() -> None:
    lm = lm_of("llama")
    more = {"kind": "topk", "sparsity": 3.0, "steps": 10, "batch_size": 64, "seed": 3}
    with untouched(lm):
        made = sae.fit(lm, TEXTS, site=SITE, tokens=500, **more)
    assert made.features == 4 * 32
    x = harvest(lm, TEXTS, [SITE], tokens=500, seed=3)[SITE]
    again = learn(x, width=128, site_in=SITE, **more)
    assert all(torch.equal(v, again.parts()[0][name]) for name, v in made.parts()[0].items())
    assert (made.encode(x) > 0).sum(dim=1).max() <= 3


def test_more_steps_say_more_of_other_texts() -> None:
    lm, seen = lm_of("llama"), []
    for steps in (1, 300):
        made = sae.fit(lm, TEXTS[:25], site=SITE, tokens=900, width=64, sparsity=6, steps=steps,
                       batch_size=128)  # fmt: skip
        seen.append(fidelity.measure(lm, TEXTS[25:], dictionary=made, reference=TEXTS[:25]))
    before, after = (float(one.fvu.mean()) for one in seen)
    assert after < 0.6 * before


def test_a_folder_is_kept_and_not_written_over(tmp_path: Path) -> None:
    lm = lm_of("gpt2")
    more = {"site": SITE, "tokens": 200, "width": 16, "sparsity": 2, "batch_size": 50, "steps": 4}
    made = sae.fit(lm, TEXTS, folder=tmp_path, **more)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    again = sae.fit(lm, [[5]], folder=tmp_path, **more)  # nothing is run
    assert torch.equal(made.W_enc, again.W_enc)
    with pytest.raises(ResultError, match="another dictionary"):
        sae.fit(lm, TEXTS, folder=tmp_path, **more | {"seed": 1})
    with pytest.raises(InputError, match="1,300 tokens were asked for"):
        sae.fit(lm, TEXTS, **more | {"tokens": 1300})
