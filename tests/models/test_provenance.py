"""A result says which weights it is of and what was at work on them; asking is cheap while nothing
changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stratoscope.editing import needle, top_k
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import ablate, add, intervene, knock_out
from stratoscope.engine.trace import trace
from stratoscope.models import provenance, wrap
from stratoscope.models.lm import LM
from stratoscope.models.provenance import Revision, weight_hash
from stratoscope.tokens import next_token
from support import tiny

NAME = "model.layers.1.mlp.down_proj.weight"
ROWS = [[3, 14, 15]]


def fresh(recorded: str | None = None) -> LM:
    lm = wrap(tiny.model("llama"))
    if recorded:
        lm.revision = Revision(lm.model, recorded)
    return lm


@torch.no_grad()
def _scale(lm: LM) -> None:
    lm.model.get_parameter(NAME).mul_(0.5)


@torch.no_grad()
def _one_number(lm: LM) -> None:
    """Not one of those that `state` looks at."""
    lm.model.get_parameter(NAME)[1, 1] += 1


def _through_data(lm: LM) -> None:
    lm.model.lm_head.weight.data.mul_(2)


def _half(lm: LM) -> None:
    lm.model.half()


def _bfloat16(lm: LM) -> None:
    lm.model.to(torch.bfloat16)


def _step(lm: LM) -> None:
    optimiser = torch.optim.SGD(lm.model.parameters(), lr=0.1)
    lm.model(input_ids=torch.tensor(ROWS)).logits.sum().backward()
    optimiser.step()


def _load(lm: LM) -> None:
    lm.model.load_state_dict(tiny.model("llama", seed=1).state_dict())


def _new(lm: LM) -> None:
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.detach() + 1)


@pytest.mark.parametrize("recorded", [None, "of the card"])
@pytest.mark.parametrize(
    "change", [_scale, _one_number, _through_data, _half, _bfloat16, _step, _load, _new]
)
def test_weights_that_changed_in_place_have_another_name(
    change: Callable[[LM], None], recorded: str | None
) -> None:
    lm = fresh(recorded)
    before = lm.provenance["weights"]
    assert before == (recorded or weight_hash(lm.model))
    change(lm)
    assert lm.provenance["weights"] == weight_hash(lm.model) != before


@pytest.mark.parametrize("recorded", [None, "of the card"])
def test_an_edit_of_weights_is_named_inside_and_forgotten_outside(recorded: str | None) -> None:
    """Also edits one after the other, whose tensors may lie where the last one's lay and differ in
    one number."""
    lm = fresh(recorded)
    before = lm.provenance
    for row in range(12):
        delta = torch.zeros(32, 48)
        delta[row + 7, 5] = 1.0
        with Edit(lm, deltas={NAME: delta}, note=f"row {row}"):
            inside = lm.provenance
            assert inside["weights"] == weight_hash(lm.model)
            assert inside["changes"] == [{"edit": f"row {row}", "weights": [NAME]}]
        assert lm.provenance == before
    with needle.edit(lm, [(0, 1)]):
        assert lm.provenance["weights"] == weight_hash(lm.model) != before["weights"]
    assert lm.provenance == before


def test_what_is_at_work_is_listed() -> None:
    lm = fresh()
    clean = next_token.measure(lm, ROWS)
    vector = torch.linspace(-1, 1, 32)
    changes = (
        ablate("layers.*.mlp.out", positions=[0, -1]),
        add("layers.1.resid_post", vector, examples=[0], steps=[0]),
        knock_out(0, -1, [[0]], heads=[2]),
    )
    with (
        intervene(lm, *changes),
        Edit(lm, [ablate("layers.0.attn.out")], note="no attention"),
        top_k.edit(lm, [(2, 5)]),
    ):
        inside = next_token.measure(lm, ROWS)
    told = json.loads(inside.attrs["provenance"])
    assert told["changes"] == [
        {"edit": "no attention"},
        {
            "site": [f"layers.{layer}.mlp.out" for layer in range(3)],
            "operation": "replace",
            "value": 0.0,
            "positions": [0, -1],
        },
        {
            "site": "layers.1.resid_post",
            "operation": "add",
            "value": told["changes"][2]["value"],
            "examples": [0],
            "steps": [0],
        },
        {
            "site": "layers.0.attn.scores",
            "operation": "replace",
            "value": "-inf",
            "positions": -1,
            "units": [2],
            "keys": [[0]],
        },
        {"site": "layers.0.attn.out", "operation": "replace", "value": 0.0},
        {"site": "layers.2.mlp.act", "operation": "largest", "value": 5.0},
    ]
    assert told["changes"][2]["value"]["shape"] == [32]
    assert "changes" not in json.loads(clean.attrs["provenance"])
    with intervene(lm, add("layers.1.resid_post", -vector)):
        [other] = lm.provenance["changes"]
    assert other["value"] != told["changes"][2]["value"]  # another vector, another result


def test_hooks_of_others_are_counted_and_ours_are_not() -> None:
    lm = fresh()
    handles = [
        lm.model.model.layers[1].register_forward_hook(lambda *_: None),
        lm.model.lm_head.register_forward_pre_hook(lambda *_: None),
    ]
    lm.model(input_ids=torch.tensor(ROWS), output_hidden_states=True)  # Transformers' own stay up
    with trace(lm, "layers.0.attn.pattern", "logits", stop=False):
        assert lm.provenance["changes"] == [
            {"foreign_hooks": 2, "at": ["model.layers.1", "lm_head"]}
        ]
    for handle in handles:
        handle.remove()
    assert "changes" not in lm.provenance


def test_asking_again_hashes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh()
    before = lm.provenance
    monkeypatch.setattr(provenance, "weight_hash", lambda *_: pytest.fail("hashed anew"))
    with intervene(lm, ablate("layers.0.mlp.out")):
        assert lm.provenance["weights"] == before["weights"]
    with Edit(lm, deltas={NAME: torch.ones(32, 48)}):
        pass
    lm(ROWS)
    lm.model.zero_grad()
    assert lm.provenance == before


def test_weights_that_are_no_numbers_have_a_name_too() -> None:
    lm = fresh()
    with torch.no_grad():
        lm.model.lm_head.weight[0, 0] = torch.nan
    assert lm.provenance["weights"] == lm.provenance["weights"] == weight_hash(lm.model)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        made: Any = tiny.model("llama")
    assert wrap(made).provenance["weights"] == weight_hash(made)


class _Touchy(torch.nn.Linear):
    """As bitsandbytes' 4-bit layer on a CPU: to be asked for its state changes its weights."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.weight.data.mul_(2)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def test_naming_the_weights_of_a_layer_that_its_state_changes_leaves_them_alone() -> None:
    lm = fresh()
    old = lm.model.model.layers[1].mlp.down_proj
    touchy = _Touchy(old.in_features, old.out_features, bias=False)
    touchy.weight.data.copy_(old.weight)
    touchy.weight.quant_state = "codes"  # by which such parameters are known
    lm.model.model.layers[1].mlp.down_proj = touchy
    named = lm.provenance["weights"]
    assert torch.equal(touchy.weight, old.weight)
    assert lm.provenance["weights"] == named == weight_hash(lm.model)
    _through_data(lm)
    assert lm.provenance["weights"] == weight_hash(lm.model) != named
    assert torch.equal(touchy.weight, old.weight)
