"""Every cell is a whole run with a plain hook; a planted concept stands out from its nulls, and
what it costs is counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stratoscope.editing import steer, steering_grid
from stratoscope.engine.intervene import add
from stratoscope.engine.sweep import plan
from stratoscope.errors import InputError
from stratoscope.maths.resample import interval
from support.concept import FOIL, MORE, PLAIN, concept, pairs
from support.subjects import CORRUPT, ROWS, THREE, close, lm_of, padded, untouched

TEXTS = ("llama", "gpt2", "planted")
EXAMPLE = {
    "measure": lambda case: {
        "vectors": {
            f"layers.{n}.resid_post": torch.linspace(-1, 1, case.lm.dims.dim) for n in (0, 1)
        },
        "strengths": [-1.0, 2.0],
        "answer": case.answer,
        "foil": case.foil,
        "texts": case.references if case.name in TEXTS else None,
        "draws": 1,
    }
}
WHOLE_ANSWER = {"vectors": {"layers.1.resid_post": torch.ones(32)}, "strengths": [1.0]}
ONE_TOKEN = "a grid asks one next token"
DOSES = [-2.0, 0.5, 1.0]


def plainly(name: str, layer: int, vector: torch.Tensor, row: list[int]) -> torch.Tensor:
    """(position, vocab) by a forward hook on the layer."""
    model = lm_of(name).model
    block = model.transformer.h[layer] if name == "gpt2" else model.model.layers[layer]

    def hook(_: object, __: object, out: object) -> object:
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handle = block.register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    handle.remove()
    return logits


@pytest.mark.parametrize("name", THREE)
def test_every_cell_is_a_plain_hook_s_run(name: str) -> None:
    lm = lm_of(name)
    found = steer.fit(lm, list(zip(ROWS, CORRUPT)))
    given = {"vectors": found, "strengths": DOSES, "answer": 7, "foil": 9}
    with untouched(lm):
        result = steering_grid.measure(lm, ROWS, **given, texts=CORRUPT, draws=1)
    for layer in result.layer.values:
        for number, row in enumerate(ROWS):
            plain = plainly(name, 0, torch.zeros(1), row)[-1]
            for dose in DOSES:
                logits = plainly(
                    name, layer, dose * found.vectors[f"layers.{layer}.resid_post"], row
                )
                moved = (logits[-1, 7] - logits[-1, 9]) - (plain[7] - plain[9])
                cell = result.effect.sel(layer=layer, strength=dose)[number]
                close(float(cell) + 1, float(moved) + 1, 1e-5)
    assert abs(result.effect.values).max() > 0.1
    for number, row in enumerate(CORRUPT):
        before = plainly(name, 0, torch.zeros(1), row).log_softmax(-1)
        after = plainly(name, 1, -2 * found.vectors["layers.1.resid_post"], row).log_softmax(-1)
        cell = result.sel(layer=1, strength=-2.0, text=number)
        nll = -after[:-1].gather(1, torch.tensor(row[1:])[:, None]).mean()
        close(cell.perplexity, nll.exp())
        close(cell.kl, (before.exp() * (before - after)).sum(-1).mean())
        close(cell.base_perplexity, (-before[range(len(row) - 1), row[1:]].mean()).exp())
    left = steering_grid.measure(lm, padded(ROWS, "left"), **given, draws=1)
    close(left.effect, result.effect, 1e-5)


def test_a_planted_concept_stands_out() -> None:
    lm = concept()
    found = steer.fit(lm, pairs(24))
    prompts = [[PLAIN[n], PLAIN[n + 1], PLAIN[n + 2]] for n in range(6)]
    asked = {"strengths": [-0.5, 0.5], "answer": MORE, "foil": FOIL, "draws": 5}
    result = steering_grid.measure(lm, prompts, vectors=found, **asked)
    said = steering_grid.response(result)
    assert (said.slope_low > 0).all()
    assert (said.slope > 2 * abs(result.null_random).max() / 0.5 / 2).all()
    assert said.null_slope.sizes == {"layer": 3, "draw": 10}
    assert (abs(said.null_slope).max("draw") == said.bound).all()
    assert (said.selectivity > 1).all()
    # the wrong vector: a direction that the answer does not read
    other = {name: torch.linalg.qr(torch.stack([x, torch.ones(32)], 1))[0][:, 1] * x.norm()
             for name, x in found.vectors.items()}  # fmt: skip
    wrong = steering_grid.response(steering_grid.measure(lm, prompts, vectors=other, **asked))
    assert (wrong.selectivity < said.selectivity / 2).all()
    assert "null_shuffled" in result
    assert "null_shuffled" not in steering_grid.measure(lm, prompts, vectors=other, **asked)


def test_the_dose_response_is_counted_by_hand() -> None:
    lm = concept()
    prompts = [[PLAIN[n], PLAIN[n + 1], PLAIN[n + 2]] for n in range(6)]
    found = steer.fit(lm, pairs(8), site="layers.1.resid_post")
    result = steering_grid.measure(
        lm, prompts, vectors=found, strengths=DOSES, answer=MORE, foil=FOIL, draws=1
    )
    said = steering_grid.response(result)
    effect = result.effect.values[0]
    each = [sum(s * e for s, e in zip(DOSES, column)) / 5.25 for column in effect.T]
    value, low, high, *_ = interval(each)
    close([said.slope[0], said.slope_low[0], said.slope_high[0]], [value, low, high], 1e-6)
    assert low < np.mean(each) < high
    close(said.effect[0], effect.mean(axis=1), 1e-6)
    assert json.loads(said.attrs["settings"])["strengths"] == DOSES
    few = steering_grid.response(result.isel(example=slice(0, 3)))
    assert np.isnan(few.slope_low).all()
    assert np.isfinite(few.slope).all()


def test_random_nulls_are_as_long_and_shuffled_ones_are_of_other_labels() -> None:
    found = steer.fit(concept(), pairs(16))
    site = "layers.1.resid_post"
    vector, both = found.vectors[site], found.states[site]
    drawn = steering_grid.controls(vector, both, "mean", 40, 0)
    close(torch.stack(drawn["random"]).norm(dim=1), vector.norm().expand(40))
    along = {kind: torch.stack(x) @ vector / vector.norm() ** 2 for kind, x in drawn.items()}
    for turn in along.values():
        assert float(turn.min()) < 0 < float(turn.max())
        assert float(turn.abs().max()) < 0.7
    # what is left of the vector is what chance leaves: (2 pairs - 1) ** -0.5 of it
    assert 0.5 < float(along["shuffled"].std()) * 31**0.5 < 1.5
    # the wrong null: made as long, it is mostly the vector again, or its opposite
    longer = [float(x @ vector / x.norm() / vector.norm()) for x in drawn["shuffled"]]
    assert np.median(np.abs(longer)) > 0.7
    assert "shuffled" not in steering_grid.controls(vector, both[:, :3], "mean", 2, 0)


def test_a_set_of_words_and_any_metric_can_be_asked() -> None:
    lm = lm_of("llama")
    vector = {"layers.0.resid_post": torch.linspace(-1, 1, 32)}

    def mass(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1)[:, [3, 4]].sum(dim=1).log()

    result = steering_grid.measure(lm, ROWS, vectors=vector, strengths=[2.0], metric=mass, draws=0)
    expected = [
        float(
            mass(plainly("llama", 0, 2 * vector["layers.0.resid_post"], row)[-1:], torch.zeros(1))
        )
        for row in ROWS
    ]
    close(result.effect[0, 0] + result.base, expected, 1e-5)
    assert set(result.data_vars) == {"effect", "base"}


def test_most_of_the_work_is_shared_where_one_position_changes() -> None:
    lm = lm_of("llama")
    shares = []
    for positions in (None, -1):
        cells = [
            add(f"layers.{n}.resid_post", torch.ones(32), positions=positions) for n in (0, 1, 2)
        ]
        done = plan(lm, ROWS, cells)
        assert done.naive == 0
        shares.append(done.packed_rows / done.naive_rows)
    assert shares[0] == pytest.approx(1.0) or shares[0] <= 1
    assert shares[1] < shares[0] / 4


def test_what_cannot_be_asked_is_refused() -> None:
    lm = lm_of("llama")
    vector = {"layers.1.resid_post": torch.ones(32)}
    asked = {"answer": 7, "foil": 9, "draws": 0}
    for wrong in ([], [1.0, 1.0], [float("inf")]):
        with pytest.raises(InputError, match="give at least one number, each once"):
            steering_grid.measure(lm, ROWS, vectors=vector, strengths=wrong, **asked)
    with pytest.raises(InputError, match=r"strength 1e\+30 at `layers.1.resid_post`"):
        steering_grid.measure(lm, ROWS, vectors=vector, strengths=[1.0, 1e30], **asked)

    def broken(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where((logits[:, 7] - base).abs() < 1e-3, logits[:, 7], torch.inf)

    base = plainly("llama", 0, torch.zeros(1), ROWS[0])[-1, 7]
    with pytest.raises(InputError, match=r"strength 2 at `layers.1.resid_post` is too far"):
        steering_grid.measure(
            lm, ROWS[:1], vectors=vector, strengths=[0.0, 2.0], metric=broken, draws=0
        )
    both = vector | {"layers.1.mlp.out": torch.ones(32)}
    with pytest.raises(InputError, match="one vector for each layer"):
        steering_grid.measure(lm, ROWS, vectors=both, strengths=[1.0], **asked)
    with pytest.raises(InputError, match="perplexity is of texts of two tokens"):
        steering_grid.measure(lm, ROWS, vectors=vector, strengths=[1.0], texts=[[3]], **asked)
    with pytest.raises(InputError, match="without a tokenizer"):
        steering_grid.log_probability(lm, [" good"])
