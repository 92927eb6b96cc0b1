"""Masked language models are read at their mask token: against plain transformers, for prompts of
unequal length whose masks stand in different places."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from stratoscope.circuits import output_nodes
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.heads import answer_suppression, argument_passing, roles
from stratoscope.layers import activation_patching, direct_logit_attribution
from stratoscope.models import LM, wrap
from stratoscope.neurons import contribution
from stratoscope.tokens import next_token, occlusion
from support import tiny

M = 4
ROWS = [[1, 14, M, 92, 65, 2], [1, 46, 26, M, 2], [M, 5, 8, 2]]
CORRUPT = [[1, 77, M, 92, 80, 2], [1, 46, 50, M, 2], [M, 5, 81, 2]]
READ = [2, 3, 0]
ASKED: dict[str, Any] = {"answer": 5, "foil": 9}
NAMES = ("bert", "distilbert", "roberta", "modernbert", "electra")


@cache
def subject(name: str) -> LM:
    if name == "electra":
        torch.manual_seed(0)
        config = hf.ElectraConfig(**tiny.SMALL, embedding_size=16, initializer_range=0.5)
        model: Any = hf.ElectraForMaskedLM(config).eval()
    elif name == "llama":  # made bidirectional, as embedders are: its logits are linear
        model = tiny.model("llama")
        model.config.is_causal = False
    else:
        model = tiny.model(name)
    model.config.mask_token_id = M
    return wrap(model)


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))

    def laid(row: list[int], fill: int) -> list[int]:
        pad = [fill] * (width - len(row))
        return [*row, *pad] if side == "right" else [*pad, *row]

    ids = [laid(row, 0) for row in rows]
    mask = [laid([1] * len(row), 0) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def plain(lm: LM, row: list[int], **given: Any) -> Tensor:
    """The model's own logits at the mask token."""
    given = given or {"input_ids": torch.tensor([row])}
    return lm.model(**given).logits[0, row.index(M)]


def difference(lm: LM, row: list[int]) -> float:
    with torch.no_grad():
        logits = plain(lm, row)
    return float(logits[5] - logits[9])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prediction_is_read_at_the_mask(name: str, side: str) -> None:
    lm = subject(name)
    batch = lm.batch(padded(ROWS, side))
    assert lm.readout.positions(batch).tolist() == READ
    assert not any("fills in masked" in note for note in batch.notes)
    with torch.no_grad():
        expected = torch.stack([plain(lm, row) for row in ROWS])
    gap = last_logits(lm, batch) - expected
    assert gap.abs().max() < 1e-4
    assert gap.norm() < 1e-4 * expected.norm()
    found = next_token.measure(lm, batch, **ASKED).logit_difference
    assert found.values.tolist() == pytest.approx([difference(lm, r) for r in ROWS], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_occlusion_and_gradients_follow_it(name: str) -> None:
    lm = subject(name)
    gone = occlusion.measure(lm, ROWS, replacement="zero", **ASKED)
    _, _, found = gradients(lm, ROWS, ["embed"], lambda logits: logits[:, 5] - logits[:, 9])
    module = lm.model.get_input_embeddings()
    for e, row in enumerate(ROWS):
        x = module(torch.tensor([row])).detach().requires_grad_(True)
        logits = plain(lm, row, inputs_embeds=x)
        [gradient] = torch.autograd.grad(logits[5] - logits[9], x)
        got = next(iter(found.values()))[e, : len(row)]
        assert (got - gradient[0]).norm() < 1e-3 * gradient.norm()
        blank = x.detach().clone()
        blank[0, 1] = 0
        with torch.no_grad():
            less = plain(lm, row, inputs_embeds=blank)
        expected = difference(lm, row) - float(less[5] - less[9])
        assert float(gone.attribution[e, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_patching_follows_it(name: str) -> None:
    """The stream of layer 1 exchanged at one place, by a plain hook."""
    lm = subject(name)
    found = activation_patching.measure(lm, ROWS, corrupt=CORRUPT, **ASKED)
    layer = lm.layout.layers[""][1]
    for e, (row, other) in enumerate(zip(ROWS, CORRUPT)):
        clean, corrupt = difference(lm, row), difference(lm, other)
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).clone())

        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        difference(lm, row)
        handle.remove()
        for p in (1, READ[e]):

            def patch(
                _: Any, args: Any, kwargs: Any, p: int = p, x: Tensor = seen[0]
            ) -> tuple[Any, Any]:
                now = (args[0] if args else kwargs["hidden_states"]).clone()
                now[0, p] = x[0, p]
                if args:
                    return (now, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": now}

            handle = layer.register_forward_pre_hook(patch, with_kwargs=True)
            expected = (difference(lm, other) - corrupt) / (clean - corrupt)
            handle.remove()
            assert float(found.effect[e, 1, p]) == pytest.approx(expected, abs=2e-3)


def test_heads_are_exchanged_where_the_model_is_read() -> None:
    lm, site = subject("bert"), "layers.1.attn.z"
    found = argument_passing.measure(lm, ROWS, corrupt=CORRUPT, **ASKED)
    for e, (row, other) in enumerate(zip(ROWS, CORRUPT)):
        z = capture(lm, [other], site)[site][:, READ[e] : READ[e] + 1, 2:3]
        with intervene(lm, replaced(site, z, positions=READ[e], units=[2])):
            said = lm([row]).logits[0, READ[e]]
        moved = float((said[5] - said[9]).detach())
        clean, corrupt = difference(lm, row), difference(lm, other)
        expected = (moved - clean) / (corrupt - clean)
        assert float(found.effect[e, 1, 2]) == pytest.approx(expected, abs=1e-3)


def test_what_is_linear_follows_it() -> None:
    """A decoder made bidirectional with a mask token: what components write sums to its logits at
    the mask, for prompts together and alone."""
    lm = subject("llama")
    assert lm.readout.positions(lm.batch(ROWS)).tolist() == READ
    whole = [difference(lm, row) for row in ROWS]
    direct = direct_logit_attribution.measure(lm, ROWS, **ASKED)
    assert direct.total.values.tolist() == pytest.approx(whole, abs=1e-3)
    neurons = contribution.measure(lm, ROWS, **ASKED)
    nodes = output_nodes.measure(lm, ROWS, corrupt=CORRUPT, nodes=2, draws=1, **ASKED)
    assert nodes.clean_difference.values.tolist() == pytest.approx(whole, abs=1e-3)
    lost = answer_suppression.measure(lm, ROWS, answer=5, layer=1)
    for e, row in enumerate(ROWS):
        alone = contribution.measure(lm, [row], **ASKED).contribution[0].values
        assert neurons.contribution.values[e] == pytest.approx(alone, abs=1e-4)
        one = output_nodes.measure(lm, [row], corrupt=[CORRUPT[e]], nodes=2, draws=1, **ASKED)
        assert nodes.direct.values[e] == pytest.approx(one.direct.values[0], abs=1e-3)
        own = answer_suppression.measure(lm, [row], answer=5, layer=1)
        for name in (n for n in lost.data_vars if lost[n].dims[:1] == ("example",)):
            assert lost[name].values[e] == pytest.approx(own[name].values[0], abs=1e-4)
    assert roles.measure(lm, ROWS, **ASKED).score.notnull().any()


def test_no_mask_or_several_are_read_at_the_end_with_a_note() -> None:
    lm = subject("bert")
    none = lm.batch([[1, 14, 15, 2]])
    assert lm.readout.positions(none).tolist() == [3]
    assert "last token of each prompt ('2')" in none.notes[0]
    assert "Put the mask token where a word is asked for" in none.notes[0]
    several = lm.batch([[1, M, 15, M, 2], ROWS[1]])
    assert lm.readout.positions(several).tolist() == [4, 3]
    assert "2 mask tokens: leave the one that is asked for" in several.notes[0]
    assert "each prompt without a mask token" not in none.notes[0]


def test_a_causal_model_is_read_at_its_end_whatever_stands_there() -> None:
    model = tiny.model("llama")
    model.config.mask_token_id = M
    lm = wrap(model)
    assert lm.readout.positions(lm.batch(ROWS)).tolist() == [5, 4, 3]
