"""Head patching finds the planted heads, equals patching by plain hooks, and does not depend on the
batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from stratoscope.engine.pair import random_like
from stratoscope.heads import activation_patching
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import (
    CORRUPT,
    ROWS,
    THREE,
    close,
    entering,
    lm_of,
    logits_with,
    padded,
    parts,
    untouched,
)

EXAMPLE = {
    "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer, "foil": case.foil}
}

ANSWER, FOIL = 5, 60


@pytest.mark.parametrize("p", planted.everything(), ids=lambda p: p.name)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_planted_heads(p: planted.Planted, direction: Literal["denoise", "noise"]) -> None:
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = activation_patching.measure(
            lm, p.clean, corrupt=p.corrupt, answer=p.answer, foil=p.foil, direction=direction
        )
    effect, null = found.effect.values[0], found.null.values[0]
    order = np.argsort(-effect, axis=None)[: len(p.heads)]
    assert {divmod(int(i), effect.shape[1]) for i in order} == set(p.heads)
    for head in np.ndindex(effect.shape):
        if head in p.heads:
            assert effect[head] > 0.95
        elif head in p.opposing_heads:
            assert effect[head] < -0.25
        else:
            assert abs(effect[head]) < 0.05
    assert (abs(null) < 0.5).all()


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_equals_plain_hooks(name: str, direction: Literal["denoise", "noise"]) -> None:
    lm = lm_of(name)
    clean, corrupt = ROWS[0], CORRUPT[0]
    with untouched(lm):
        found = activation_patching.measure(
            lm, [clean], corrupt=[corrupt], answer=ANSWER, foil=FOIL, direction=direction
        )
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    size, expected = lm.dims.head_dim, np.zeros((3, 4))

    def difference(layer: int, change: object) -> float:
        logits = logits_with(lm, parts(lm, layer)[0], base, change)
        return float(logits[ANSWER] - logits[FOIL])

    with torch.no_grad():
        whole = lm.model(torch.tensor([source])).logits[0, -1]
    start, end = difference(0, lambda x: None), float(whole[ANSWER] - whole[FOIL])
    for layer in range(3):
        z = entering(lm, parts(lm, layer)[0], source)
        for head in range(4):
            mine = slice(head * size, (head + 1) * size)
            got = difference(layer, lambda x, m=mine, z=z: x[:, m].copy_(z[:, m]))
            expected[layer, head] = (got - start) / (end - start)
    assert abs(expected).max() > 0.05  # there is something to compare
    close(found.effect[0], expected, 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batched_equals_single(name: str, side: str) -> None:
    lm = lm_of(name)
    options = {"answer": ANSWER, "foil": FOIL}
    found = activation_patching.measure(
        lm, padded(ROWS, side), corrupt=padded(CORRUPT, side), **options
    )
    for example in range(2):
        alone = activation_patching.measure(
            lm, [ROWS[example]], corrupt=[CORRUPT[example]], **options
        )
        for variable in ("effect", "null"):
            close(found[variable][example], alone[variable][0], 1e-3)


def test_null() -> None:
    lm = lm_of("llama")
    run = lambda seed: activation_patching.measure(  # noqa: E731
        lm, [ROWS[0]], corrupt=[CORRUPT[0]], answer=ANSWER, foil=FOIL, seed=seed
    )
    first, again, other = run(0), run(0), run(1)
    assert first.identical(again)
    assert first.effect.equals(other.effect)
    assert not first.null.equals(other.null)

    generator = torch.Generator().manual_seed(3)
    base, source = (torch.randn(2, 1, 5, 4, 8, generator=generator) for _ in range(2))
    source[:, :, :2] = base[:, :, :2]
    moved = random_like(base, source, 0)
    close((moved - base).norm(dim=-1), (source - base).norm(dim=-1), 1e-4)
    # nothing is changed where the prompts agree
    assert torch.equal(moved[:, :, :2], base[:, :, :2])
    cosine = torch.cosine_similarity(moved - base, source - base, dim=-1)[:, :, 2:]
    assert cosine.abs().mean() < 0.6
