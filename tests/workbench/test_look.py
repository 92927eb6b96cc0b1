"""What a click says is what the model does, by hooks of our own on the plain model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from stratoscope.errors import InputError, StratoscopeError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.workbench import look
from stratoscope.workbench.state import State
from stratoscope.workbench.unit import Unit


@pytest.fixture(scope="module")
def truth():
    return planted.fact_lookup()


@pytest.fixture(scope="module")
def lm(truth):
    return wrap(truth.model, truth.tokenizer)


def state_of(truth, **more) -> State:
    return State("m", truth.clean, truth.answer, truth.foil, **more)


@contextmanager
def hooked(module, change):
    """change: what the module is given, changed."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def logits(truth, text: str) -> torch.Tensor:
    with torch.no_grad():
        ids = truth.tokenizer(text, return_tensors="pt")["input_ids"]
        return truth.model(ids).logits[0, -1]


def difference(truth, values: torch.Tensor) -> float:
    answer, foil = (
        truth.tokenizer(w, add_special_tokens=False)["input_ids"][0]
        for w in (truth.answer, truth.foil)
    )
    return float(values[answer] - values[foil])


def test_a_heads_changes_are_those_of_plain_hooks(truth, lm) -> None:
    unit = Unit.parse("L0H1")
    width = lm.dims.head_dim
    mine = slice(unit.number * width, (unit.number + 1) * width)
    module = truth.model.model.layers[unit.layer].self_attn.o_proj
    seen = {}
    with hooked(module, lambda x: seen.setdefault("corrupt", x)):
        logits(truth, truth.corrupt)

    def put(value):
        def change(x):
            x = x.clone()
            x[..., mine] = value(x[..., mine])
            return x

        return change

    ways = {
        "as it is": lambda x: x,
        "switched off": torch.zeros_like,
        "at its mean over the prompt": lambda x: x.mean(dim=1, keepdim=True).expand_as(x),
        "as in the corrupt prompt": lambda x: seen["corrupt"][..., mine],
        "3 times as strong": lambda x: 3 * x,
    }
    shown = look.changed(lm, state_of(truth, corrupt=truth.corrupt), unit, 3.0, None)
    assert [row["way"] for row in shown["rows"]] == list(ways)
    for row in shown["rows"]:
        with hooked(module, put(ways[row["way"]])):
            values = logits(truth, truth.clean)
        assert row["difference"] == pytest.approx(difference(truth, values), abs=1e-4)
        best = values.softmax(-1).topk(look.TOP)
        assert [p for _, p in row["tokens"]] == pytest.approx(best.values.tolist(), abs=1e-5)
    others = []
    for other in range(lm.dims.heads):
        at = slice(other * width, (other + 1) * width)
        zero = torch.ones(width * lm.dims.heads).index_fill(0, torch.arange(at.start, at.stop), 0)
        if other != unit.number:
            with hooked(module, lambda x, zero=zero: x * zero):
                others.append(difference(truth, logits(truth, truth.clean)))
    plain = difference(truth, logits(truth, truth.clean))
    found = look.chance(lm, state_of(truth), unit, None)
    assert found == pytest.approx((min(others) - plain, max(others) - plain, 3), abs=1e-4)
    first, *rest = shown["rows"]
    assert first["change"] is None
    assert all(
        row["change"] == pytest.approx(row["difference"] - first["difference"]) for row in rest
    )


def test_a_planted_neuron_is_beyond_its_neighbours(truth, lm) -> None:
    layer, number = sorted(truth.neurons)[0]
    shown = look.changed(lm, state_of(truth), Unit("neuron", layer, number), None, None)
    off = next(row for row in shown["rows"] if row["way"] == "switched off")
    low, _, _ = look.chance(lm, state_of(truth), Unit("neuron", layer, number), None)
    assert off["change"] < low - 5  # the fact is gone; no neighbour holds it
    told = look.pictures(lm, state_of(truth), Unit("neuron", layer, number))
    assert truth.answer.strip() in " ".join(told["words"]["speaks for"])


def test_a_stream_as_in_the_corrupt_prompt_brings_its_answer(truth, lm) -> None:
    last = len(lm.batch(truth.clean).tokens[0]) - 1
    shown = look.changed(
        lm,
        state_of(truth, corrupt=truth.corrupt),
        Unit("stream", lm.dims.layers - 1, last),
        None,
        None,
    )
    row = next(row for row in shown["rows"] if row["way"] == "as in the corrupt prompt")
    want = difference(truth, logits(truth, truth.corrupt))
    assert row["difference"] == pytest.approx(want, abs=1e-3)
    assert look.chance(lm, state_of(truth), Unit("stream", 0, last), None) is None
    assert not any(row["way"] == "switched off" for row in shown["rows"])


@pytest.mark.parametrize("name", ["L0H0", "L1N3", "L1M", "L1T2", "T0"])
def test_every_kind_of_unit_has_something_to_show(truth, lm, name: str) -> None:
    unit = Unit.parse(name)
    assert unit.name == name
    shown = look.pictures(lm, state_of(truth), unit)
    assert shown["panels"] or shown["strips"] or shown["words"]
    assert look.changed(lm, state_of(truth), unit, 2.0, None)["rows"][-1]["tokens"]


@pytest.mark.parametrize(
    "name", ["", "L5", "H3", "L-1H0", "L0H٣", "L0H1; rm", "l0h1", "L" + "9" * 50]
)
def test_what_names_no_unit_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="names no unit"):
        Unit.parse(name)


@pytest.mark.parametrize("name", ["L99H0", "L0H99", "L0N9999", "L99M", "L0T99", "T99"])
def test_what_the_model_lacks_is_refused(truth, lm, name: str) -> None:
    with pytest.raises(InputError, match=r"counted from 0|layer 0 has"):
        look.changed(lm, state_of(truth), Unit.parse(name), None, None)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e9, -5.0])
def test_a_strength_beyond_the_scale_is_refused(truth, lm, factor: float) -> None:
    with pytest.raises(InputError, match="strength"):
        look.changed(lm, state_of(truth), Unit.parse("L0H0"), factor, None)


def test_top_texts_are_of_a_neuron_and_need_texts(truth, lm) -> None:
    layer, number = sorted(truth.neurons)[0]
    found = look.top_texts(lm, Unit("neuron", layer, number), [truth.clean, truth.corrupt])
    values = [value for value, *_ in found]
    assert values == sorted(values, reverse=True)
    assert all(token and before + token + after for _, before, token, after in found)
    for unit, texts in ((Unit("head", 0, 0), ["x"]), (Unit("neuron", 0, 0), [])):
        with pytest.raises(StratoscopeError, match="texts"):
            look.top_texts(lm, unit, texts)


def test_what_is_kept_gives_the_same_and_is_not_asked_twice(truth, lm) -> None:
    kept: dict = {}
    asked: list = []

    def once(name, make):
        asked.append(name)
        return kept[name] if name in kept else kept.setdefault(name, make())

    for unit in map(Unit.parse, ("L0H1", "L1H2", "L1N3", "L1T2", "T1", "L0M")):
        state = state_of(truth, corrupt=truth.corrupt)
        a = look.changed(lm, state, unit, 2.0, None)
        b = look.changed(lm, state, unit, 2.0, None, once)
        assert [(r["way"], r["difference"]) for r in a["rows"]] == [
            (r["way"], pytest.approx(r["difference"], abs=1e-5)) for r in b["rows"]
        ]
        look.pictures(lm, state, unit, once)
    assert len(kept) == len(set(asked)) < len(asked)
