"""The index finds the planted neuron from both sides, and equals the whole table of logits on three
architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.lab.planted.canvas import ANSWER
from stratoscope.lab.planted.facts import CAPITALS, NEURON
from stratoscope.models import wrap
from stratoscope.neurons import _weights, token_neurons, vocabulary
from support.subjects import ROWS, THREE, close, entering, lm_of, padded, parts, untouched

EXAMPLE = {"measure": {}}

SIDES = ("down", "up", "gate")


def test_planted_facts_by_what_neurons_write() -> None:
    """The neuron of each country is the one that stands for its capital; and it fires at the
    country, not there."""
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = token_neurons.measure(lm, " ".join(CAPITALS.values()), side="down", top=1)
    assert (found.layer == 1).all()
    assert found.neuron[0, :, 0].values.tolist() == list(NEURON.values())
    assert (found.place == 0).all()
    assert (found.score > 4).all()
    assert (abs(found.activation) < 1).all()


@torch.no_grad()
def test_planted_reader() -> None:
    """A neuron whose up weights are a token's own direction is found among all, by the side that
    holds them."""
    p = planted.fact_lookup()
    token = p.tokenizer("Kenya")["input_ids"][0]
    p.model.model.layers[0].mlp.up_proj.weight[7] = 0.0
    p.model.model.layers[0].mlp.up_proj.weight[7, ANSWER[token]] = 1.0
    lm = wrap(p.model, p.tokenizer)
    for fold in (True, False):
        found = token_neurons.measure(lm, "Kenya", side="up", top=1, fold=fold).squeeze()
        assert (int(found.layer), int(found.neuron), int(found.place)) == (0, 7, 0)
    other = token_neurons.measure(lm, "Kenya", side="gate", top=1).squeeze()
    assert (int(other.layer), int(other.neuron)) != (0, 7)
    assert int(token_neurons.top_tokens(lm)[0, 7]) == token


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_equals_the_whole_table(name: str, side: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = token_neurons.measure(lm, padded(ROWS, "left"), side=side, top=4)
    table = torch.stack(
        [_weights.decode(lm, _weights.directions(lm, layer, side)) for layer in range(3)]
    ).flatten(0, 1)
    score = (table - table.mean(dim=1, keepdim=True)) / table.std(dim=1, keepdim=True, correction=0)
    assert torch.equal(token_neurons.top_tokens(lm, side=side).flatten(), table.argmax(dim=1))
    for example, row in enumerate(ROWS):
        best = score[:, row].topk(4, dim=0)
        close(found.score[example, : len(row)], best.values.T, 2e-3)
        where = torch.tensor(
            (found.layer * lm.dims.neurons + found.neuron).values[example, : len(row)]
        )
        assert torch.equal(where, best.indices.T)
        own = table[where, torch.tensor(row)[:, None]]
        assert (
            found.place[example, : len(row)].values.tolist()
            == (table[where] > own[..., None]).sum(-1).tolist()
        )
        acts = torch.stack(
            [entering(lm, parts(lm, layer)[1], row) for layer in range(3)], dim=1
        ).flatten(1)
        close(found.activation[example, : len(row)], acts.gather(1, where), 1e-4)
    assert (found.neuron[1, len(ROWS[1]) :] == -1).all()
    assert np.isnan(found.score[1, len(ROWS[1]) :]).all()


@pytest.mark.parametrize("name", [*THREE, "gpt_neox", "phi3", "opt"])
@torch.no_grad()
def test_reading_is_linear_in_the_stream(name: str) -> None:
    """Up to the norm's scale and bias, what a neuron's pre-activation gains from a step is the step
    along `gate`."""
    lm = lm_of(name)
    read, norm = _weights.directions(lm, 1, "gate"), _weights.pre_norm(lm, 1)
    assert norm is not None
    module, point = lm.layout.locate(lm.layout.resolve_one("layers.1.mlp.pre"))
    x = 50 * torch.randn(lm.dims.dim, generator=torch.Generator().manual_seed(0))
    scale = x.pow(2).mean() if "RMS" in type(norm).__name__ else x.var(correction=0)
    pre = module(norm(x)) - module(norm(torch.zeros_like(x)))
    pre = pre if point.part is None else pre.chunk(2)[point.part[0]]
    close(pre, read @ x / scale.sqrt(), 1e-3)


@torch.no_grad()
def test_up_and_gate_are_the_matrices_by_their_own_names() -> None:
    mlp = lm_of("llama").model.model.layers[1].mlp
    for side, matrix in (("up", mlp.up_proj), ("gate", mlp.gate_proj)):
        assert torch.equal(_weights.directions(lm_of("llama"), 1, side, fold=False), matrix.weight)
    joined = lm_of("phi3").model.model.layers[1].mlp.gate_up_proj.weight
    for side, half in (("gate", joined[:48]), ("up", joined[48:])):
        assert torch.equal(_weights.directions(lm_of("phi3"), 1, side, fold=False), half)
    lm = lm_of("gpt2")
    assert torch.equal(
        _weights.directions(lm, 1, "up", fold=False), lm.model.transformer.h[1].mlp.c_fc.weight.T
    )


def test_vocabulary_reads_the_same() -> None:
    lm = lm_of("gemma2")
    found = token_neurons.measure(lm, [[5]], top=1).squeeze()
    words = vocabulary.measure(lm, [(int(found.layer), int(found.neuron))], top=96, side="up")
    assert words.promoted[0, int(found.place)].item() == "5"


def test_refusals() -> None:
    for top in (0, 145):
        with pytest.raises(InputError, match="choose 1 to 144"):
            token_neurons.measure(lm_of("llama"), ROWS, top=top)
    for name in ("bert", "mixtral"):
        with pytest.raises(SiteError):
            token_neurons.measure(lm_of(name), ROWS)
