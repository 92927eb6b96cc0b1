"""The neuron that was made to write a list of words is found by that list, and by no other; scores
equal the table."""

from __future__ import annotations

import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.lab.planted.canvas import ANSWER
from stratoscope.lab.planted.facts import CAPITALS
from stratoscope.models import wrap
from stratoscope.neurons import _weights, concept_vectors
from support.subjects import ROWS, THREE, close, entering, lm_of, padded, parts, untouched

EXAMPLE = {"measure": {}}


@torch.no_grad()
def test_planted_concept() -> None:
    p = planted.fact_lookup()
    words = " ".join(CAPITALS)
    column = p.model.model.layers[0].mlp.down_proj.weight[:, 20]
    column.zero_()
    column[[ANSWER[i] for i in p.tokenizer(words)["input_ids"]]] = 1.0
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = concept_vectors.measure(lm, [words, "the capital of"], top=3)
    assert (int(found.layer[0, 0]), int(found.neuron[0, 0])) == (0, 20)
    assert float(found.share[0, 0]) == 1.0
    assert found.score[0, 0] > 1.5 * found.score[0, 1]
    assert found.score[0, 0] > 1.5 * found.null_score[0]
    assert (int(found.layer[1, 0]), int(found.neuron[1, 0])) != (0, 20)


def test_share_by_hand() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert concept_vectors.shared(logits, torch.tensor([0, 3])).tolist() == [0.5, 0.5]
    assert concept_vectors.shared(logits, torch.tensor([0, 1, 2])).tolist() == pytest.approx(
        [1.0, 1 / 3]
    )


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_equals_the_whole_table(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = concept_vectors.measure(lm, padded(ROWS, "left"), top=4)
    table = torch.stack(
        [_weights.decode(lm, _weights.directions(lm, layer, "down")) for layer in range(3)]
    ).flatten(0, 1)
    score = (table - table.mean(dim=1, keepdim=True)) / table.std(dim=1, keepdim=True, correction=0)
    for example, row in enumerate(ROWS):
        best = score[:, sorted(set(row))].mean(dim=1).topk(4)
        close(found.score[example], best.values, 2e-3)
        where = torch.tensor((found.layer * lm.dims.neurons + found.neuron).values[example])
        assert torch.equal(where, best.indices)
        acts = torch.stack(
            [entering(lm, parts(lm, layer)[1], row) for layer in range(3)], dim=1
        ).flatten(1)
        close(found.activation[example], acts[:, where].mean(dim=0), 1e-4)


def test_refusals() -> None:
    with pytest.raises(InputError, match="choose 1 to 144"):
        concept_vectors.measure(lm_of("llama"), ROWS, top=145)
    for name in ("bert", "mixtral"):
        with pytest.raises(SiteError):
            concept_vectors.measure(lm_of(name), ROWS)
