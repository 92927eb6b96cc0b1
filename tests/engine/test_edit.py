"""Edits of weights and sites: made, kept, saved, and taken back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import add, clamped, intervene, knock_out, replaced, scaled
from stratoscope.errors import InputError, SiteError
from stratoscope.models import wrap
from support import tiny

PROMPTS = tiny.inputs("llama")
NAME = "model.layers.1.mlp.down_proj.weight"


def logits(lm: object) -> torch.Tensor:
    with torch.no_grad():
        return lm(PROMPTS)["logits"]


def delta(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, 48, generator=torch.Generator().manual_seed(seed))


def weights(lm: object) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in lm.model.state_dict().items()}


def same(lm: object, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())


def test_a_weight_edit_is_the_sum_inside_and_nothing_outside() -> None:
    lm = wrap(tiny.model("llama"))
    before, plain = weights(lm), logits(lm)
    other = tiny.model("llama")
    with torch.no_grad():
        other.get_parameter(NAME).add_(delta())
    with Edit(lm, deltas={NAME: delta()}):
        assert torch.equal(logits(lm), logits(wrap(other)))
        assert not torch.equal(logits(lm), plain)
    assert same(lm, before)
    assert torch.equal(logits(lm), plain)


def test_weights_come_back_even_where_subtraction_would_not_bring_them() -> None:
    lm = wrap(tiny.model("llama"))
    before = weights(lm)
    with Edit(lm, deltas={NAME: torch.full((32, 48), 1e20)}):
        pass
    assert same(lm, before)
    with Edit(lm, deltas={NAME: torch.full((32, 48), torch.nan)}):
        assert bool(lm.model.get_parameter(NAME).isnan().all())
    assert same(lm, before)


def test_tied_weights_are_one_weight() -> None:
    lm = wrap(tiny.model("smollm2"))
    before = weights(lm)
    name = "model.embed_tokens.weight"
    with Edit(lm, deltas={name: torch.ones(96, 32)}):
        assert torch.equal(lm.model.lm_head.weight, before[name] + 1)
    assert same(lm, before)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_an_edit_joins_weights_and_sites() -> None:
    lm = wrap(tiny.model("llama"))
    change = scaled("layers.*.attn.z", 0.5, units=[1])
    with Edit(lm, [change], {NAME: delta()}):
        both = logits(lm)
    with Edit(lm, deltas={NAME: delta()}), intervene(lm, change):
        assert torch.equal(logits(lm), both)


def test_edits_nest_and_the_same_edit_twice() -> None:
    lm = wrap(tiny.model("llama"))
    before = weights(lm)
    one, two = (
        Edit(lm, deltas={NAME: delta()}),
        Edit(lm, [scaled("layers.0.mlp.out", 0.5)], {NAME: delta(1)}),
    )
    with one, two, one:
        assert torch.equal(
            lm.model.get_parameter(NAME), before[NAME] + delta() + delta(1) + delta()
        )
    assert same(lm, before)
    assert not lm.taps.listening
    with pytest.raises(KeyboardInterrupt), one:
        raise KeyboardInterrupt
    assert same(lm, before)


def test_half_precision_weights_take_a_float_delta() -> None:
    lm = wrap(tiny.model("llama").bfloat16())
    before = weights(lm)
    with Edit(lm, deltas={NAME: delta()}):
        assert lm.model.get_parameter(NAME).dtype == torch.bfloat16
        assert not torch.equal(lm.model.get_parameter(NAME), before[NAME])
    assert same(lm, before)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    lm = wrap(tiny.model("llama"))
    value = torch.linspace(-1, 1, 32)
    changes = [
        add("layers.*.resid_post", value, positions=-1),
        add("layers.0.mlp.out", value),
        clamped("layers.1.mlp.act", high=0.5, units=range(3)),
        scaled("layers.2.attn.z", 0.3, units=(1, 2), examples=[1]),
        replaced(
            "layers.1.resid_pre", torch.zeros(32).expand(2, 2, 32), positions=[[0, 1], [2, 3]]
        ),
        knock_out(2, torch.tensor([3]), [0, 1], heads=[0]),
    ]
    edit = Edit(lm, changes, {NAME: delta().T.contiguous().T}, note="a note")
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(lm, tmp_path / "edit.safetensors")
    assert again.note == "a note"
    assert len(again.interventions) == 8
    with edit:
        expected = logits(lm)
    with again:
        assert torch.equal(logits(lm), expected)
    assert not torch.equal(logits(lm), expected)
    again.save(tmp_path / "twice.safetensors")
    with Edit.load(lm, tmp_path / "twice.safetensors"):
        assert torch.equal(logits(lm), expected)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match=r"shape \(3, 3\); the model has \(32, 48\)"):
        Edit(lm, deltas={NAME: torch.zeros(3, 3)})
    with pytest.raises(InputError, match="no such parameter"):
        Edit(lm, deltas={"model.nothing": torch.zeros(3, 3)})
    with pytest.raises(SiteError):
        Edit(lm, [scaled("layers.9.mlp.out", 0.5)])


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_edits_may_be_left_in_any_order(order: tuple[int, ...]) -> None:
    """After each the others are still there, and after the last the weights are those of before, to
    the bit."""
    lm = wrap(tiny.model("llama"))
    before, plain = weights(lm), logits(lm)
    edits = [Edit(lm, deltas={NAME: delta(seed)}) for seed in range(3)]
    for edit in edits:
        edit.__enter__()
    left = [0, 1, 2]
    for one in order:
        edits[one].__exit__(None, None, None)
        left.remove(one)
        value = before[NAME]
        for seed in left:
            value = value + delta(seed)
        assert torch.equal(lm.model.get_parameter(NAME), value)
    assert same(lm, before)
    assert torch.equal(logits(lm), plain)


def test_an_edit_inside_itself() -> None:
    lm = wrap(tiny.model("llama"))
    before, edit = weights(lm), Edit(lm, deltas={NAME: delta()})
    with edit, edit:
        assert torch.equal(lm.model.get_parameter(NAME), before[NAME] + delta() + delta())
    assert same(lm, before)


def test_resized_embeddings_are_known_at_once() -> None:
    lm = wrap(tiny.model("llama"))
    lm.model.resize_token_embeddings(120, mean_resizing=False)
    assert lm.dims.vocab == 120
    assert logits_of(lm, [[3, 119]]).shape == (1, 2, 120)
    lm.model.resize_token_embeddings(50, mean_resizing=False)
    with pytest.raises(InputError, match="ids run from 0 to 50 - 1"):
        lm([[3, 60]])


def logits_of(lm: object, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return lm(rows)["logits"]


def test_an_edit_gives_back_the_weights_of_today() -> None:
    """Those that stood there when the last edit was closed may have been replaced meanwhile."""
    lm = wrap(tiny.model("llama"))
    weight = lm.model.get_parameter(NAME)
    with Edit(lm, deltas={NAME: delta()}):
        pass
    trained = weight.detach() + delta(1)
    weight.data = trained.clone()
    with Edit(lm, deltas={NAME: delta()}):
        assert torch.equal(weight, trained + delta())
    assert torch.equal(weight, trained)
