"""Gradient-weighted attention by plain Hugging Face: eager patterns with their own gradients,
summed over paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models import wrap
from stratoscope.tokens import gradient_attention
from support import tiny
from support.slopes import ANSWER, FOIL
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
ONE_TOKEN = "its gradient is taken at one position"


def test_by_hand() -> None:
    pattern = torch.tensor([[1.0, 0.0], [0.4, 0.6]])
    slope = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    twice = torch.stack([pattern, pattern])[:, None, None]
    found = gradient_attention.relevance(twice, torch.stack([slope, slope])[:, None, None])
    close(found[0, 1], [1.6, 0.0])  # 0.8 in each layer; what speaks against is dropped
    assert float(found[0, 0].abs().max()) == 0


def plain(model, given: dict, answer: int, foil: int, read: int) -> tuple[Tensor, float]:
    """Every pattern's gradient by autograd on the eager kernel's own patterns."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**given, output_attentions=True)
    logits = out.logits[0, read] if out.logits.ndim == 3 else out.logits[0]
    d = logits[answer] - logits[foil]
    slopes = torch.autograd.grad(d, out.attentions)
    model.set_attn_implementation(kernel)
    size = out.attentions[0].shape[-1]
    total = torch.eye(size)
    for a, g in zip(out.attentions, slopes):
        total = total + (a * g).clamp(min=0)[0].mean(dim=0).detach() @ total
    return (total - torch.eye(size))[read], float(d.detach())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_it_is_that_of_the_eager_kernel(name: str) -> None:
    model = tiny.model(name)
    lm = wrap(model)
    with untouched(lm):
        found = gradient_attention.measure(lm, ROWS, answer=ANSWER, foil=FOIL)
    left = gradient_attention.measure(lm, padded(ROWS, "left"), answer=ANSWER, foil=FOIL)
    answers, foils = (x if isinstance(x, list) else [x] * 2 for x in (ANSWER, FOIL))
    for n, row in enumerate(ROWS):
        given = {"input_ids": torch.tensor([row])}
        expected, d = plain(model, given, answers[n], foils[n], len(row) - 1)
        close(found.attribution[n, : len(row)], expected)
        close(left.attribution[n, : len(row)], expected)
        assert float(found.logit_difference[n]) == pytest.approx(d, rel=1e-3)
        assert float(expected.sum()) > 1e-3


def test_pictures_are_read_at_the_class_token() -> None:
    lm, given = lm_of("vit"), tiny.inputs("vit")
    found = gradient_attention.measure(lm, given, answer=1, foil=3)
    expected, _ = plain(lm.model, given, 1, 3, 0)
    close(found.attribution[0], expected)


def test_no_gradient_under_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        gradient_attention.measure(lm_of("gpt2"), ROWS, answer=ANSWER, foil=FOIL)
