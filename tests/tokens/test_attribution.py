"""The three attributions equal plain Hugging Face and torch, find planted positions, and do not
depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from stratoscope.engine.entry import entry
from stratoscope.engine.metric import target
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.tokens import _kinds, gradient_times_input, integrated_gradients, occlusion
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, untouched

ANSWER, FOIL = 5, 60
METHODS = (gradient_times_input, integrated_gradients, occlusion)
# planted models where what the story tells happens at just these tokens, and to no other
NAMES = ("copy_head", "induction", "induction_gpt2", "fact_lookup", "fact_lookup_moved", "two_hop")
PLANTED = [getattr(planted, name)() for name in NAMES]
name = lambda x: getattr(x, "name", None) or x.__name__.rpartition(".")[2]  # noqa: E731


def difference(lm: LM, embeds: Tensor) -> Tensor:
    """The logit difference by plain Hugging Face, from token embeddings (example, position, dim),
    no padding."""
    logits = lm.model(inputs_embeds=embeds).logits[:, -1]
    return logits[:, ANSWER] - logits[:, FOIL]


def slope(lm: LM, embeds: Tensor) -> Tensor:
    """Gradient of the difference with respect to token embeddings, by plain torch."""
    leaf = embeds.detach().requires_grad_(True)
    [gradient] = torch.autograd.grad(difference(lm, leaf).sum(), leaf)
    return gradient


def embeddings(lm: LM, row: list[int]) -> tuple[Tensor, Tensor]:
    """(1, position, dim) of a prompt, and the mean over the vocabulary."""
    table = lm.model.get_input_embeddings()
    return table(torch.tensor([row])).detach(), table.weight.detach().mean(dim=0)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradient_times_input_is_that_of_token_embeddings(model: str) -> None:
    lm = lm_of(model)
    found = gradient_times_input.measure(lm, ROWS, answer=ANSWER, foil=FOIL)
    for e, row in enumerate(ROWS):
        x, _ = embeddings(lm, row)
        close(found.attribution.values[e, : len(row)], (slope(lm, x) * x).sum(-1)[0].numpy())
        close(found.logit_difference.values[e], difference(lm, x).detach().numpy()[0])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("replacement", ["mean", "zero", 7])
def test_occlusion_is_that_of_token_embeddings(model: str, replacement: str | int) -> None:
    lm = lm_of(model)
    found = occlusion.measure(lm, ROWS, answer=ANSWER, foil=FOIL, replacement=replacement)
    for e, row in enumerate(ROWS):
        x, mean = embeddings(lm, row)
        blank = {"mean": mean, "zero": 0 * mean, 7: embeddings(lm, [7])[0][0, 0]}[replacement]
        many = x.repeat(len(row), 1, 1)
        many[range(len(row)), range(len(row))] = blank
        with torch.no_grad():
            expected = difference(lm, x) - difference(lm, many)
        close(found.attribution.values[e, : len(row)], expected.numpy())


@pytest.mark.parametrize(
    ("model", "baseline"), [("llama", "mean"), ("gpt2", "mean"), ("gpt2", "zero")]
)
def test_integrated_gradients_equals_a_fine_riemann_sum(
    model: str, baseline: Literal["mean", "zero"]
) -> None:
    lm = lm_of(model)
    options = {"baseline": baseline, "steps": 513, "tolerance": 1e-4}
    found = integrated_gradients.measure(lm, ROWS, answer=ANSWER, foil=FOIL, **options)
    for e, row in enumerate(ROWS):
        x, mean = embeddings(lm, row)
        mean = mean if baseline == "mean" else 0 * mean
        blank = mean.expand_as(x)
        a = (torch.arange(2000) + 0.5) / 2000
        gradient = torch.cat(
            [slope(lm, blank + b[:, None, None] * (x - blank)) for b in a.split(500)]
        ).mean(dim=0)
        expected = (gradient * (x[0] - mean)).sum(dim=-1).numpy()
        close(found.attribution.values[e, : len(row)], expected, 1e-3)
        rise = float((difference(lm, x) - difference(lm, blank)).detach())
        assert abs(float(found.completeness_error[e])) < 1e-3 * max(1, abs(rise))
        close(float(found.logit_difference[e] - found.baseline_difference[e]), rise, 1e-4)


def test_expected_gradients_are_the_mean_over_ways_from_words_of_the_kinds() -> None:
    lm, row = lm_of("llama"), ROWS[1]
    options = {"steps": 257, "tolerance": 1e-4, "baseline": "kind", "draws": 2, "seed": 4}
    found = integrated_gradients.measure(lm, [ROWS[0], row], answer=ANSWER, foil=FOIL, **options)
    batch = lm.batch([row])
    drawn = _kinds.words(lm, batch, 2, 4, target(lm, batch, ANSWER, FOIL))[:, 0]
    assert not {ANSWER, FOIL} & set(drawn.flatten().tolist())
    x, _ = embeddings(lm, row)
    a = (torch.arange(500) + 0.5) / 500
    expected = torch.zeros(len(row))
    rise = 0.0
    for ids in drawn.tolist():
        blank, _ = embeddings(lm, ids)
        gradient = slope(lm, blank + a[:, None, None] * (x - blank)).mean(dim=0)
        expected += (gradient * (x - blank)[0]).sum(dim=-1) / 2
        rise += float((difference(lm, x) - difference(lm, blank)).detach()) / 2
    close(found.attribution.values[1, : len(row)], expected.numpy(), 1e-3)
    close(float(found.logit_difference[1] - found.baseline_difference[1]), rise, 1e-3)
    assert int(found.points[1]) <= 2 * 257


def _poly(degree: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda a: (a ** (degree + 1), torch.stack([(degree + 1) * a**degree, 0 * a], dim=1))


def test_the_integral_is_exact_for_cubic_rates_and_finds_a_narrow_jump() -> None:
    for degree in range(4):
        total, a, value = integrated_gradients.integrate(_poly(degree), steps=9, tolerance=0.0)
        assert torch.allclose(total, torch.tensor([1.0, 0.0]).double(), atol=1e-12)
        assert len(a) == 9
        assert float(value[-1]) == 1
    assert (
        abs(float(integrated_gradients.integrate(_poly(9), 9, 0.0)[0][0]) - 1) > 1e-5
    )  # nine points do not do

    def jump(a: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sigmoid((a - 0.37) * 1000)
        return y, (1000 * y * (1 - y))[:, None]

    total, a, _ = integrated_gradients.integrate(jump, 65, 1e-3)
    even = jump((torch.arange(65, dtype=torch.float64) + 0.5) / 65)[1].mean()
    assert abs(float(total[0]) - 1) < 0.01 < 0.1 < abs(float(even) - 1)
    assert len(a) <= 65


@pytest.mark.parametrize("p", PLANTED, ids=name)
def test_planted_positions_by_expected_gradients(p: planted.Planted) -> None:
    """As by integrated gradients: of a pair whose product counts, the second gets less."""
    lm = wrap(p.model, p.tokenizer)
    found = integrated_gradients.measure(lm, p.clean, answer=p.answer, foil=p.foil, baseline="kind")
    size = abs(found.attribution.values[0])
    assert int(size.argmax()) in p.positions
    rest = [i for i in range(len(size)) if i not in p.positions]
    assert size[rest].max() < 0.3 * size.max()


@pytest.mark.parametrize("p", PLANTED, ids=name)
@pytest.mark.parametrize("method", [occlusion, integrated_gradients], ids=name)
def test_planted_positions(p: planted.Planted, method: ModuleType) -> None:
    """Exactly the planted positions lead, and little is left for others: by integrated gradients a
    bit, because half way the distractor's pair draws attention too. Gradient times input is not
    asked: planted attention is saturated.
    """
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = method.measure(lm, p.clean, answer=p.answer, foil=p.foil)
    size = abs(found.attribution.values[0])
    order = [int(i) for i in np.argsort(-size)]
    assert set(order[: len(p.positions)]) == set(p.positions)
    rest = [i for i in range(len(size)) if i not in p.positions]
    assert size[rest].max() < {occlusion: 0.03, integrated_gradients: 0.15}[method] * size.max()
    assert size[list(p.positions)].min() > 0.9
    if "null" in found:
        assert abs(found.null.values[0]).max() < 0.5 * size.max()


@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2", "bert"])
def test_batch_and_padding_do_not_matter(method: ModuleType, model: str) -> None:
    lm = lm_of(model)
    words = {"answer": ANSWER, "foil": FOIL}
    with untouched(lm):
        alone = [method.measure(lm, [row], **words) for row in ROWS]
        both = [method.measure(lm, padded(ROWS, side), **words) for side in ("left", "right")]
    for found in both:
        for e, row in enumerate(ROWS):
            for variable in found.data_vars:
                if "position" in found[variable].dims:
                    close(found[variable].values[e, : len(row)], alone[e][variable].values[0])
                    assert np.isnan(found[variable].values[e, len(row) :]).all()
                elif variable != "completeness_error":
                    close(found[variable].values[e], alone[e][variable].values[0])
        assert list(found.text.values[1, len(ROWS[1]) :]) == [""] * (len(ROWS[0]) - len(ROWS[1]))


def test_batch_size_of_the_path_does_not_matter() -> None:
    lm = lm_of("llama")
    one, many = (
        integrated_gradients.measure(lm, ROWS, answer=5, foil=60, batch_size=n) for n in (1, 16)
    )
    close(one.attribution.values[0], many.attribution.values[0])
    assert (one.points == many.points).all()


def test_a_missed_sum_is_said() -> None:
    """Sharp attention makes the way rough: nine points miss it, and more points come nearer."""
    lm = lm_of("llama")
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
    options = {"answer": ANSWER, "foil": FOIL, "tolerance": 1e-3}
    rough, fine = (integrated_gradients.measure(lm, ROWS[0], steps=n, **options) for n in (9, 513))
    rise = abs(float(rough.logit_difference[0] - rough.baseline_difference[0]))
    assert abs(float(rough.completeness_error[0])) > 0.1 * rise
    assert "Example 0: the attributions miss their sum" in rough.attrs["notes"]
    assert abs(float(fine.completeness_error[0])) < 0.02 * rise
    assert fine.attrs["notes"] == ""


def test_the_occlusion_null_has_a_seed_of_its_own() -> None:
    lm = lm_of("gpt2")
    state = torch.get_rng_state()
    first, again, other = (occlusion.measure(lm, ROWS, seed=s).null.values[0] for s in (0, 0, 1))
    assert (first == again).all()
    assert not np.allclose(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_position_embedding_is_no_evidence() -> None:
    """The blank entry keeps GPT-2's position embeddings, and Gemma's scale stands in both."""
    lm = lm_of("gpt2")
    batch = lm.batch([ROWS[0]])
    positions = lm.model.transformer.wpe.weight[: len(ROWS[0])]
    x, blank = entry(lm, batch, "zero")
    assert torch.equal(blank[0], positions)
    assert torch.allclose(x - blank, lm.model.transformer.wte(batch.ids), atol=1e-6)
    gemma = lm_of("gemma2")
    x, blank = entry(gemma, gemma.batch([[3, 3, 9]]), 3)
    assert torch.equal(x[0, :2], blank[0, :2])
    assert not torch.allclose(x[0, 2], blank[0, 2])


def test_an_image_is_not_a_token() -> None:
    lm = lm_of("llava")
    inputs = tiny.inputs("llava")
    picture = (inputs["input_ids"][0] == tiny.IMAGE).numpy()
    for method in METHODS:
        found = method.measure(lm, inputs, answer=5, foil=60).attribution.values[0]
        assert (np.isnan(found) == picture).all()


def test_refusals() -> None:
    lm, p = lm_of("llama"), planted.copy_head()
    with pytest.raises(InputError, match="no token ids"):
        occlusion.measure(lm_of("vit"), tiny.inputs("vit"))
    with pytest.raises(SiteError):
        gradient_times_input.measure(lm_of("bert_base"), ROWS)
    with pytest.raises(InputError, match="tokenizer"):
        occlusion.measure(lm, ROWS, replacement="the")
    with pytest.raises(InputError, match="one token"):
        occlusion.measure(wrap(p.model, p.tokenizer), p.clean, replacement="the window")
    with pytest.raises(InputError, match="steps"):
        integrated_gradients.measure(lm, ROWS, steps=3)
    for module in lm.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    with pytest.raises(InputError, match="the metric whose gradient is asked is nan"):
        integrated_gradients.measure(lm, ROWS, baseline="zero")
