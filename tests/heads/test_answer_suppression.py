"""Answer suppression: a planted head that takes the answer back, and shares that add up to Hugging
Face's logits."""

from __future__ import annotations

import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import answer_suppression
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, logits_with, parts, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer}}
WHOLE_ANSWER = {"layer": 1}
ONE_TOKEN = "one token's logit"


def test_the_planted_opponent_is_found() -> None:
    p = planted.suppression()
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = answer_suppression.measure(lm, p.clean, answer=p.answer).isel(example=0)
    [(layer, head)] = p.opposing_heads
    assert layer == lm.dims.layers - 1
    words = lm.dims.vocab
    assert float(found.head_write[head]) == pytest.approx(-5 * (1 - 1 / words), abs=0.3)
    assert float(found.raw_change) == pytest.approx(-5, abs=0.5)
    assert float(found.change) < -4
    assert int(found.removal.argmax("head")) == head
    assert float(found.removal[head]) > 0
    assert abs(found.null).max() < abs(found.removal[head]) / 2
    others = found.head_write.drop_sel(head=head)
    assert abs(others).max() < 0.3
    mover = answer_suppression.measure(lm, p.clean, answer=p.answer, layer=0).isel(example=0)
    assert float(mover.change) > 10  # layer 0 says the answer
    assert int(mover.removal.argmin("head")) == next(iter(p.heads))[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    lm, row, token = lm_of(name), ROWS[0], 7
    found = answer_suppression.measure(lm, [row], answer=token).isel(example=0)
    states = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    hooks = [
        lm.layout.layer(lm.layout.resolve_one("layers.2.resid_post")).register_forward_hook(
            lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
        )
    ]
    logits = lm.model(torch.tensor([row])).logits[0, -1]
    hooks[0].remove()
    before, after, head = (
        states[2][0, -1].double(),
        seen[0][0, -1].double(),
        lm.model.lm_head.weight.double(),
    )
    if name == "gpt2":
        norm = lm.model.transformer.ln_f
        step = after - before
        step = (
            (step - step.mean())
            / (after.var(unbiased=False) + norm.eps).sqrt()
            * norm.weight.double()
        )
    else:
        norm = lm.model.model.norm
        weight = norm.weight.double() + (name == "gemma2")
        step = (after - before) / (after.square().mean() + 1e-6).sqrt() * weight
    lens = [
        lm.model.lm_head(norm(x.float())).float().log_softmax(-1)[token] for x in (before, after)
    ]
    if name != "gemma2":  # its logits have a soft cap
        close(found.lens_change, lens[1] - lens[0], 1e-4)
    moved = head @ step
    assert float(found.raw_change) == pytest.approx(float(moved[token]), rel=1e-3, abs=1e-3)
    assert float(found.change) == pytest.approx(
        float(moved[token] - moved.mean()), rel=1e-3, abs=1e-3
    )
    if name != "gpt2":  # no biases: heads and MLP are all there is
        total = float(found.head_write.sum() + found.mlp_write)
        assert total == pytest.approx(float(found.change), rel=1e-3, abs=1e-3)
    said = logits.log_softmax(-1)[token]
    close(found.log_probability, said, 1e-4)
    size, module = lm.dims.head_dim, parts(lm, 2)[0]
    for number in range(4):
        here = slice(number * size, (number + 1) * size)
        without = logits_with(lm, module, row, lambda x, here=here: x[-1, here].zero_())
        expected = float(without.log_softmax(-1)[token] - said)
        assert float(found.removal[number]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_refusals() -> None:
    with pytest.raises(SiteError, match="not linear"):
        answer_suppression.measure(lm_of("bert"), ROWS)
    with pytest.raises(SiteError):
        answer_suppression.measure(lm_of("llama"), ROWS, layer=9)


@pytest.mark.parametrize("layer", [-4, -5, 3])
def test_a_layer_that_is_not_there_is_refused_from_the_end_as_well(layer: int) -> None:
    """-5 of 3 layers was answered with the numbers of -2."""
    with pytest.raises(SiteError, match=f"layer={layer}: this model has 3"):
        answer_suppression.measure(lm_of("llama"), ROWS, layer=layer)
    first = answer_suppression.measure(lm_of("llama"), ROWS, layer=-3)
    close(
        first.head_write, answer_suppression.measure(lm_of("llama"), ROWS, layer=0).head_write, 1e-9
    )


def test_suppressors_are_named_strongest_first() -> None:
    lm = lm_of("llama")
    found = answer_suppression.measure(lm, ROWS, answer=[7, 8], layer=1)
    write = found.head_write.values.mean(axis=0)
    against = [(1, int(head)) for head in write.argsort() if write[head] < 0]
    assert answer_suppression.suppressors(found, lm.dims.heads) == against
    assert answer_suppression.suppressors(found, 1) == against[:1]
    with pytest.raises(InputError, match="9 heads of a layer that has 4"):
        answer_suppression.suppressors(found, 9)
