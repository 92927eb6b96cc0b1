"""circuits.overlap: importances against plain hooks and planted circuits, the null against its
closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.circuits import overlap, path_patching
from stratoscope.engine.pair import pair
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import circuits as subjects
from support import tiny
from support.subjects import close, entering, parts, untouched

EXAMPLE = {
    "measure": lambda case: {
        "corrupt": case.corrupt,
        "answer": case.answer,
        "foil": case.foil,
        "other": case.references,
        "other_corrupt": case.at().inputs,
        "k": 3,
    }
}
WHOLE_ANSWER = {"other": [[3, 14, 15]], "other_corrupt": [[3, 70, 15]], "k": 3}


def test_the_strongest_by_size_and_what_two_tables_share() -> None:
    one, other = np.zeros((2, 3)), np.zeros((2, 3))
    one[0, 1], one[1, 2], one[1, 0] = 0.5, -0.9, 0.1
    other[1, 2], other[0, 0], other[0, 1] = 0.2, 0.3, 0.1
    assert overlap.strongest(one, 3) == [(1, 2), (0, 1), (1, 0)]
    assert overlap.strongest(np.ones((2, 3)), 2) == [(0, 0), (0, 1)]  # of equals the earlier
    assert overlap.shared(one, other, 2) == 0.5
    assert overlap.shared(one, one, 2) == overlap.shared(one, other, 6) == 1
    change = np.stack([one, 3 * one])
    task = overlap.Carried(change, np.array([1.0, 3.0]))
    close(task.importance(), one, 1e-12)
    close(task.importance([1, 1]), one, 1e-12)


def test_chance_is_hypergeometric() -> None:
    heads, k = 270, 14
    drawn = overlap.chance(heads, k, seed=3)
    variance = k * (k / heads) * (1 - k / heads) * (heads - k) / (heads - 1) / k**2
    assert abs(drawn.mean() - k / heads) < 3 * (variance / len(drawn)) ** 0.5
    assert len(drawn) == 1000
    assert abs(drawn.var() / variance - 1) < 0.3
    assert overlap.chance(5, 5).tolist() == [1.0] * 1000


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_importance_is_what_plain_transformers_gives(name: str) -> None:
    """The corrupt run's write of one head in the stream that the final norm reads, by plain
    hooks."""
    lm = tiny.lm(name)
    model = lm.model
    size, last = lm.dims.head_dim, lm.dims.layers - 1
    base = model.transformer if name == "gpt2" else model.model
    final = base.ln_f if name == "gpt2" else base.norm
    lost, gap = np.zeros((lm.dims.layers, lm.dims.heads)), 0.0
    for clean, corrupt in zip(subjects.CLEAN, subjects.CORRUPT):
        runs = [entering(lm, final, row)[-1] for row in (clean, corrupt)]
        ends = [read(model, final, x) for x in runs]
        gap += ends[1] - ends[0]
        for layer in range(last + 1):
            out = parts(lm, layer)[0]
            z = [entering(lm, out, row)[-1] for row in (clean, corrupt)]
            weight = out.weight if name == "gpt2" else out.weight.T
            for head in range(lm.dims.heads):
                here = slice(head * size, (head + 1) * size)
                delta = (z[1] - z[0])[here] @ weight[here]
                lost[layer, head] += read(model, final, runs[0] + delta) - ends[0]
    with untouched(lm):
        found = overlap.measure(
            lm,
            subjects.CLEAN,
            corrupt=subjects.CORRUPT,
            other=subjects.CORRUPT,
            other_corrupt=subjects.CLEAN,
            other_answer=5,
            other_foil=9,
            k=4,
            **subjects.ASKED,
        )
    close(found.importance[0], lost / gap, 1e-4)
    order = np.argsort(-np.abs(lost).ravel())[:4]
    assert {*np.flatnonzero(found.chosen[0].values)} == {*order}
    assert np.isnan(found.overlap_low)  # four prompts are no forty


@torch.no_grad()
def read(model, final, x: torch.Tensor) -> float:
    logits = model.get_output_embeddings()(final(x[None]))[0]
    return float(logits[5] - logits[9])


def test_planted_heads_and_what_feeds_them_are_the_strongest() -> None:
    p = planted.indirect_object()
    lm, some = wrap(p.model, p.tokenizer), p.variants(5, seed=2)
    both = pair(
        lm,
        [v.clean for v in some],
        [v.corrupt for v in some],
        [v.answer for v in some],
        [v.foil for v in some],
        "noise",
    )
    for into, best in (("logits", (2, 3)), ("L2H3.q", (1, 0)), (["L1H0.v"], (0, 2))):
        task = overlap.carried(lm, both, into=into)
        found = task.importance()
        assert overlap.strongest(found, 1) == [best]
        assert found[best] > 0.9
        found[best] = 0
        assert np.abs(found).max() < 0.05
        if into != "logits":
            assert np.abs(task.change[:, best[0] + 1 :]).max() == 0  # no path leads back
    back = overlap.carried(lm, pair(lm, *some[0]))
    assert back.importance()[2, 3] == pytest.approx(1, abs=0.05)
    assert back.gap[0] == -task.gap[0]


def test_a_path_is_path_patchings_and_an_interval_needs_forty_prompts() -> None:
    lm, rows = tiny.lm("llama"), np.random.default_rng(0).integers(2, 90, (40, 3))
    clean, corrupt = rows.tolist(), np.roll(rows, 1, axis=1).tolist()
    asked = {"corrupt": corrupt, "answer": 5, "foil": 9}
    other = {"other": corrupt, "other_corrupt": clean, "other_answer": 5, "other_foil": 9}
    told: list[tuple[int, int]] = []
    found = overlap.measure(lm, clean, **asked, **other, k=4, progress=lambda *n: told.append(n))
    assert told[-1] == (1040, 1040)
    assert 0 <= float(found.overlap_low) <= float(found.overlap) <= float(found.overlap_high) <= 1
    assert found.null_overlap.shape == (1000,)
    single = path_patching.measure(lm, clean[:1], paths=[("L1H2", "logits")], **_first(asked))
    task = overlap.carried(lm, pair(lm, clean[:1], corrupt[:1], 5, 9, "noise"))
    assert single.effect.item() == pytest.approx(task.importance()[1, 2], rel=1e-4)
    asked = {"corrupt": corrupt[:2], "answer": 5, "foil": 9}
    same = {"other": clean[:2], "other_corrupt": corrupt[:2], "other_answer": 5, "other_foil": 9}
    assert float(overlap.measure(lm, clean[:2], **asked, **same, k=4).overlap) == 1


def _first(asked: dict) -> dict:
    return asked | {"corrupt": asked["corrupt"][:1]}


def test_bad_questions_are_refused() -> None:
    lm = tiny.lm("llama")
    asked = {"corrupt": subjects.CORRUPT, "other": [[3, 4]], "other_corrupt": [[5, 4]]}
    for k in (0, 13):
        with pytest.raises(InputError, match=f"k={k}: this model has 12 heads"):
            overlap.measure(lm, subjects.CLEAN, **asked, k=k)
    with pytest.raises(InputError, match="is no receiver"):
        overlap.measure(lm, subjects.CLEAN, **asked, k=2, into="L9H0.q")
    with pytest.raises(InputError, match="is no path"):
        overlap.measure(lm, subjects.CLEAN, **asked, k=2, into="L0H0.q")
    with pytest.raises(SiteError, match="ALiBi"):
        overlap.measure(tiny.lm("bloom"), subjects.CLEAN, **asked, k=2)
