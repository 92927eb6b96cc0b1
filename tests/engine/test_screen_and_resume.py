"""Gradient estimates against finite differences; an interrupted sweep goes on; a metric that is no
number is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from stratoscope.engine import packed, resume
from stratoscope.engine.intervene import Intervention, add, intervene, knock_out, replaced
from stratoscope.engine.screen import estimate, screened
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, ResultError
from stratoscope.models import LM, wrap
from stratoscope.store import tensors
from support import tiny

CLEAN = [[3, 14, 15, 92, 65, 35, 89], [38, 46, 26, 43]]
OTHER = [[5, 14, 15, 92, 61, 35, 7], [38, 47, 26, 44]]


def metric(logits: Tensor, example: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 4]


def cells(lm: LM, share: float = 1.0) -> list[Intervention]:
    """Each layer and position of the residual stream, and each head, moved a share of the way to
    other prompts."""
    found = []
    for site, unit in (("resid_pre", False), ("attn.z", True), ("mlp.act", False)):
        name = f"layers.*.{site}"
        base, source = (capture(lm, x, name).stack(name) for x in (CLEAN, OTHER))
        moved = base + share * (source - base)
        for layer in range(lm.dims.layers):
            for at in range(3):
                value = moved[layer][:, :, [at]] if unit else moved[layer][:, [at]]
                found.append(
                    replaced(
                        f"layers.{layer}.{site}",
                        value,
                        **({"units": [at]} if unit else {"positions": at}),
                    )
                )
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "bert"])
def test_estimate_is_the_slope_of_the_exact_sweep(name: str) -> None:
    lm = wrap(tiny.model(name))
    ahead, behind = (naive(lm, CLEAN, cells(lm, share=h), metric) for h in (1e-2, -1e-2))
    slope = (ahead - behind) / 2
    base = naive(lm, CLEAN, [replaced("layers.0.mlp.out", 0.0, examples=[])], metric)[0]
    guess = estimate(lm, CLEAN, cells(lm, share=1e-2), metric) - base
    assert slope.abs().max() > 1e-4
    # atol: rounding of two fp32 forward passes, far below the largest slope
    torch.testing.assert_close(guess, slope, rtol=1e-2, atol=5e-3 * float(slope.abs().max()))


def test_estimate_leaves_gradient_flags_as_they_were() -> None:
    lm = wrap(tiny.model("llama"))
    flags = [False] * 5 + [True] * (len(list(lm.model.parameters())) - 5)
    for parameter, flag in zip(lm.model.parameters(), flags):
        parameter.requires_grad_(flag)
    estimate(lm, CLEAN, cells(lm)[:3], metric)
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())


def test_screened_measures_the_top_and_a_sample_exactly() -> None:
    lm = wrap(tiny.model("llama"))
    work = cells(lm)
    whole = naive(lm, CLEAN, work, metric)
    found = screened(lm, CLEAN, work, metric, top=4, sample=9, seed=1)
    measured = found.exact.isfinite().all(dim=1)
    assert 9 <= int(measured.sum()) <= 13
    torch.testing.assert_close(found.exact[measured], whole[measured], atol=1e-4, rtol=1e-4)
    moved = (
        found.estimate - naive(lm, CLEAN, [replaced("layers.0.mlp.out", 0.0, examples=[])], metric)
    ).abs()
    assert measured[moved.amax(dim=1).argmax()]
    drawn = found.sample
    expected = torch.corrcoef(
        torch.stack([found.estimate[drawn].flatten(), whole[drawn].flatten()]).double()
    )[0, 1]
    assert found.correlation == pytest.approx(float(expected), abs=1e-3)
    with pytest.raises(InputError, match="sample"):
        screened(lm, CLEAN, work, metric, top=4, sample=1000)


def test_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, place = wrap(tiny.model("llama")), tmp_path / "sweep.safetensors"
    work, budget = cells(lm), 60_000  # a few rows in each wave
    ran: list[int] = []
    run = packed.Wave.run
    monkeypatch.setattr(
        packed.Wave, "run", lambda self, metric: ran.append(len(self.jobs)) or run(self, metric)
    )

    def stop(done: int, total: int) -> None:
        if len(ran) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(lm, CLEAN, work, metric, budget=budget, save=place, progress=stop)
    before = sum(ran)
    ran.clear()
    result = sweep(lm, CLEAN, work, metric, budget=budget, save=place)
    torch.testing.assert_close(result, naive(lm, CLEAN, work, metric), atol=1e-4, rtol=1e-4)
    after = sum(ran)
    ran.clear()
    sweep(lm, CLEAN, work, metric, budget=budget)
    assert sum(ran) == before + after  # nothing was computed twice
    ran.clear()
    sweep(lm, CLEAN, work, metric, budget=budget, save=place)
    assert ran == []
    assert [p.name for p in tmp_path.iterdir()] == [place.name]


def test_a_saved_sweep_of_another_question_is_refused(tmp_path: Path) -> None:
    lm, place = wrap(tiny.model("llama")), tmp_path / "sweep.safetensors"
    work = cells(lm)
    sweep(lm, CLEAN, work[:4], metric, save=place)
    for other in (work[:3], work[1:5]):
        with pytest.raises(ResultError, match="another sweep"):
            sweep(lm, CLEAN, other, metric, save=place)
    with pytest.raises(ResultError, match="another sweep"):
        sweep(lm, OTHER, work[:4], metric, save=place)
    place.write_bytes(b"nonsense")
    with pytest.raises(ResultError, match="not a saved sweep"):
        sweep(lm, CLEAN, work[:4], metric, save=place)


def test_a_metric_that_is_no_number_names_its_cell() -> None:
    lm = wrap(tiny.model("llama"))
    work = cells(lm)[:4]
    work[2] = replaced("layers.1.attn.z", torch.tensor(torch.nan), positions=1, units=[3])
    with pytest.raises(
        InputError, match=r"nan for cell 2, example 0: replace at layers\.1\.attn\.z .*positions 1"
    ):
        sweep(lm, CLEAN, work, metric)


def test_the_cells_with_the_largest_estimates_are_the_ones_measured() -> None:
    lm = wrap(tiny.model("llama"))
    work = cells(lm)
    guess = estimate(lm, CLEAN, work, metric)
    base = naive(lm, CLEAN, [replaced("layers.0.mlp.out", 0.0, examples=[])], metric)
    best = (guess - base).abs().amax(dim=1).argsort(descending=True)
    for seed in range(2):
        found = screened(lm, CLEAN, work, metric, top=5, sample=2, seed=seed)
        measured = found.exact.isfinite().all(dim=1)
        assert measured[best[:5]].all()
        assert int(measured.sum()) <= 7


def test_knock_outs_are_estimated_from_the_pattern_on() -> None:
    """Their scores are minus infinity; the pattern that follows is computed here by softmax without
    the key."""
    lm = wrap(tiny.model("llama"))
    cuts = [knock_out(layer, -1, [key]) for layer in range(3) for key in (0, 1)]
    patterns = []
    for cut in cuts:
        name = f"layers.{cut.site.layer}.attn"
        scores = capture(lm, CLEAN, f"{name}.scores")[f"{name}.scores"].clone()
        for row, tokens in enumerate(CLEAN):
            scores[row, :, len(tokens) - 1, cut.keys] = -torch.inf
        patterns.append(replaced(f"{name}.pattern", scores.softmax(dim=-1)))
    got, expected = (estimate(lm, CLEAN, x, metric) for x in (cuts, patterns))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    found = screened(lm, CLEAN, cuts, metric, top=1, sample=6)
    assert found.estimate.isfinite().all()
    assert found.correlation > 0.5
    torch.testing.assert_close(found.exact, naive(lm, CLEAN, cuts, metric), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"cell 1, replace at layers\.1\.mlp\.out"):
        estimate(lm, CLEAN, [cuts[0], replaced("layers.1.mlp.out", torch.inf)], metric)


def test_a_file_answers_one_question_alone(tmp_path: Path) -> None:
    """Other steps, another value, another shape or kind of the same bytes, a metric that agrees on
    the base run, an outer change: each is another sweep."""
    lm = wrap(tiny.model("llama"))
    site, each = "layers.1.resid_post", torch.linspace(-1, 2, 64)
    asked = add(site, each.view(2, 1, 32), positions=[0, 1])
    base = naive(lm, CLEAN, [[]], metric)[0]
    others = {
        "steps": replace(asked, steps=[1]),
        "value": add(site, 2 * each.view(2, 1, 32), positions=[0, 1]),
        "shape": add(site, each.view(1, 2, 32), positions=[0, 1]),
        "dtype": replace(asked, value=asked.value.view(torch.int32)),
        "positions": replace(asked, positions=[0, 2]),
    }
    place = tmp_path / "kept"
    first = sweep(lm, CLEAN, [asked], metric, save=place)
    for other in others.values():
        with pytest.raises(ResultError, match="another sweep"):
            sweep(lm, CLEAN, [other], metric, save=place)
    with pytest.raises(ResultError, match="another sweep"):
        sweep(lm, CLEAN, [asked], lambda x, e: 2 * metric(x, e) - base[e], save=place)
    # nothing that the metric reads
    outer = add("layers.2.resid_post", torch.ones(32), positions=[0])
    with intervene(lm, outer), pytest.raises(ResultError, match="another sweep"):
        sweep(lm, CLEAN, [asked], metric, save=place)
    again = sweep(lm, CLEAN, [replace(asked, positions=torch.tensor([0, 1]))], metric, save=place)
    assert torch.equal(first, again)


def test_two_writers_of_one_file_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, save, met = tmp_path / "kept", tensors.save_file, []

    def interrupted(given: dict[str, Tensor], part: Path, metadata: dict[str, str]) -> None:
        save(given, part, metadata=metadata)
        if not met:
            met.append(part)
            other = Thread(target=resume.write, args=(place, "other", torch.zeros(1)))
            other.start()
            other.join()

    monkeypatch.setattr(tensors, "save_file", interrupted)
    resume.write(place, "mine", torch.ones(2))
    assert torch.equal(resume.read(place, "mine", (2,)), torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
