"""Whole answers against plain Hugging Face log probabilities and plain hooks, the text written out
by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratoscope.engine.continued import continued
from stratoscope.engine.intervene import add, intervene, replaced, scaled
from stratoscope.engine.metric import Whole
from stratoscope.engine.sequence import slope, swept, target
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError, SiteError
from stratoscope.heads import activation_patching as heads
from stratoscope.lab import planted
from stratoscope.layers import activation_patching as layers
from stratoscope.models import LM, wrap
from stratoscope.tokens import next_token, occlusion
from support import tiny

ROWS = [[3, 14, 15, 92, 65, 35, 89, 79], [38, 46, 26, 43, 3]]
CORRUPT = [[3, 14, 77, 92, 65, 35, 80, 79], [38, 11, 26, 43, 3]]
ANSWER, FOIL = (5, 60, 7), (9, 61)
WHOLE: dict[str, Any] = {"answer": Whole(ANSWER), "foil": Whole(FOIL)}
NAMES = ("llama", "gpt2", "gemma2")
Change = Callable[[Tensor], None]


@torch.no_grad()
def log_p(model: nn.Module, row: list[int], text: tuple[int, ...]) -> float:
    """sum_k log p(text_k | row, text_<k), from one plain run on all of it."""
    logits = model(torch.tensor([[*row, *text]])).logits[0].log_softmax(dim=-1)
    return float(sum(logits[len(row) - 1 + k, token] for k, token in enumerate(text)))


def by_hand(model: nn.Module, row: list[int]) -> float:
    return log_p(model, row, ANSWER) - log_p(model, row, FOIL)


def under(module: nn.Module, change: Change, model: nn.Module, row: list[int]) -> float:
    """`by_hand` while `change` writes into what the module is given, by a plain hook."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        change(x[0])
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        return by_hand(model, row)
    finally:
        handle.remove()


@torch.no_grad()
def given(module: nn.Module, model: nn.Module, row: list[int]) -> Tensor:
    """What a module is given for a prompt: (position, dim)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    model(torch.tensor([row]))
    handle.remove()
    return seen[0]


def blocks(lm: LM) -> tuple[Any, str]:
    """Hugging Face's own layers, and the path of the module that each head's z enters."""
    if lm.family.name == "gpt2":
        return lm.model.transformer.h, "attn.c_proj"
    return lm.model.model.layers, "self_attn.o_proj"


@pytest.mark.parametrize("name", NAMES)
def test_the_prediction_is_the_sum_of_log_probabilities(name: str) -> None:
    lm = tiny.lm(name)
    found = next_token.measure(lm, ROWS, **WHOLE)
    for e, row in enumerate(ROWS):
        one, other = log_p(lm.model, row, ANSWER), log_p(lm.model, row, FOIL)
        assert float(found.logit_difference[e]) == pytest.approx(one - other, abs=2e-4)
        assert float(found.answer_probability[e]) == pytest.approx(np.exp(one), rel=1e-3)
        assert float(found.foil_probability[e]) == pytest.approx(np.exp(other), rel=1e-3)
    assert found.answer.values.tolist() == ["5607"] * 2  # without a tokenizer, ids
    assert "as wholes, of 3 and 2 tokens" in found.attrs["notes"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_the_stream_equals_plain_hooks(name: str, direction: Any) -> None:
    lm = tiny.lm(name)
    found = layers.measure(lm, ROWS, corrupt=CORRUPT, direction=direction, **WHOLE)
    stack, _ = blocks(lm)
    for e, cells in enumerate([[(0, 2), (1, 7), (2, 7), (1, 1)], [(1, 1), (2, 4)]]):
        clean, corrupt = by_hand(lm.model, ROWS[e]), by_hand(lm.model, CORRUPT[e])
        assert float(found.clean_difference[e]) == pytest.approx(clean, abs=2e-4)
        base, source = (CORRUPT, ROWS) if direction == "denoise" else (ROWS, CORRUPT)
        start, end = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        for layer, p in cells:
            x = given(stack[layer], lm.model, source[e])
            got = under(stack[layer], lambda s, p=p, x=x: s[p].copy_(x[p]), lm.model, base[e])
            effect = float(found.effect[e, layer, p])
            assert effect == pytest.approx((got - start) / (end - start), abs=1e-3)
    assert np.isnan(found.effect.values[1, :, 5:]).all()
    assert abs(found.effect.values[0, :, 2:]).max() > 0.1  # there is something to compare


@pytest.mark.parametrize("name", NAMES)
def test_patching_heads_equals_plain_hooks(name: str) -> None:
    """A head is patched at the prompt's tokens, and left alone at the answer's."""
    lm = tiny.lm(name)
    found = heads.measure(lm, ROWS, corrupt=CORRUPT, **WHOLE)
    stack, path = blocks(lm)
    size = lm.dims.head_dim
    for e, n in enumerate(map(len, ROWS)):
        clean, corrupt = by_hand(lm.model, ROWS[e]), by_hand(lm.model, CORRUPT[e])
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            module, mine = stack[layer].get_submodule(path), slice(head * size, (head + 1) * size)
            z = given(module, lm.model, ROWS[e])[:, mine]
            change: Change = lambda s, z=z, m=mine, n=n: s[:n, m].copy_(z)  # noqa: E731
            got = under(module, change, lm.model, CORRUPT[e])
            effect = float(found.effect[e, layer, head])
            assert effect == pytest.approx((got - corrupt) / (clean - corrupt), abs=1e-3)
    assert abs(found.effect.values).max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_occlusion_equals_plain_hooks(name: str) -> None:
    lm = tiny.lm(name)
    found = occlusion.measure(lm, ROWS, replacement="zero", **WHOLE)
    module = lm.model.get_input_embeddings()
    for e, row in enumerate(ROWS):
        whole = by_hand(lm.model, row)
        assert float(found.logit_difference[e]) == pytest.approx(whole, abs=2e-4)
        for p in (0, 3, len(row) - 1):

            def without(_: nn.Module, args: Any, out: Tensor, p: int = p) -> Tensor:
                out = out.clone()
                out[:, p] = 0
                return out

            handle = module.register_forward_hook(without)
            expected = whole - by_hand(lm.model, row)
            handle.remove()
            assert float(found.attribution[e, p]) == pytest.approx(expected, abs=5e-4)


def test_one_token_each_is_the_logit_difference() -> None:
    """Bit for bit where nothing is changed; what makes logits probabilities drops out."""
    lm = tiny.lm("llama")
    one, whole = {"answer": 5, "foil": 9}, {"answer": Whole([5]), "foil": Whole([9])}
    for measure, given in (
        (next_token.measure, {}),
        (occlusion.measure, {}),
        (layers.measure, {"corrupt": CORRUPT}),
        (heads.measure, {"corrupt": CORRUPT}),
    ):
        plain, found = (measure(lm, ROWS, **given, **asked) for asked in (one, whole))
        for name in plain.data_vars:
            if name == "token":
                assert (plain[name].values == found[name].values).all()
            elif "difference" in str(name):
                assert plain[name].equals(found[name])
            else:
                np.testing.assert_allclose(plain[name], found[name], atol=1e-5)


def test_answers_that_begin_alike_and_of_other_lengths() -> None:
    """What both begin with is run once; one may even be the beginning of the other."""
    lm = tiny.lm("gpt2")
    answers, foils = [Whole((5, 6, 7)), Whole((5, 6, 7))], [Whole((5, 6, 8, 4)), Whole((5, 6))]
    batch = lm.batch(ROWS)
    asked = target(lm, batch, answers, foils)
    assert continued(lm, batch, asked).example.tolist() == [0, 0, 0, 0, 1, 1, 1]
    found = next_token.measure(lm, ROWS, answer=answers, foil=foils).logit_difference
    for e, (one, other) in enumerate(zip(answers, foils)):
        expected = log_p(lm.model, ROWS[e], one.words) - log_p(lm.model, ROWS[e], other.words)
        assert float(found[e]) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single(side: str) -> None:
    lm = tiny.lm("gpt2")
    asked = {"answer": [Whole((5, 60, 7)), Whole((8, 4))], "foil": [Whole((9,)), Whole((10, 5, 3))]}

    def padded(rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows)) + 1
        pads = [[0] * (width - len(row)) for row in rows]
        laid = [[*row, *pad] if side == "right" else [*pad, *row] for row, pad in zip(rows, pads)]
        real = [[1] * len(row) for row in rows]
        kept = [[*r, *pad] if side == "right" else [*pad, *r] for r, pad in zip(real, pads)]
        return {"input_ids": torch.tensor(laid), "attention_mask": torch.tensor(kept)}

    for measure, more in (
        (layers.measure, True),
        (heads.measure, True),
        (occlusion.measure, False),
    ):
        both = measure(lm, padded(ROWS), **({"corrupt": padded(CORRUPT)} if more else {}), **asked)
        for e, row in enumerate(ROWS):
            own = {name: [words[e]] for name, words in asked.items()}
            alone = measure(lm, [row], **({"corrupt": [CORRUPT[e]]} if more else {}), **own)
            for name in alone.data_vars:
                got = both[name][e]
                if "position" in got.dims:
                    got = got.isel(position=slice(0, len(row)))
                np.testing.assert_allclose(got.values, alone[name][0].values, atol=1e-4, rtol=1e-3)


def test_the_last_position_is_the_prompt_s() -> None:
    """-1, no position at all, and a value of fewer axes: what they mean on the prompt, by hooks."""
    lm = tiny.lm("llama")
    batch = lm.batch(ROWS)
    asked, (stack, _) = target(lm, batch, **WHOLE), blocks(lm)
    vector = torch.linspace(-2, 2, lm.dims.dim)
    cells = [
        add("layers.1.resid_pre", vector, positions=-1),
        scaled("layers.1.resid_pre", 1.5),
        add("layers.1.resid_pre", vector[None].repeat(8, 1) * torch.arange(8)[:, None]),
        add("layers.1.resid_pre", vector, positions=[1, -2], examples=[1]),
    ]
    found = swept(lm, batch, cells, asked)
    for e, row in enumerate(ROWS):
        n = len(row)
        there = torch.arange(n)[:, None].float()
        changes: list[Change] = [
            lambda s, n=n: s[n - 1].add_(vector),
            lambda s, n=n: s[:n].mul_(1.5),
            lambda s, n=n, t=there: s[:n].add_(vector * t),
            lambda s, e=e, n=n: s[1 : n - 1 : n - 3].add_(e * vector),
        ]
        expected = [under(stack[1], change, lm.model, row) for change in changes]
        np.testing.assert_allclose(found[:, e].numpy(), expected, atol=1e-3)


def test_what_equals_the_prompt_s_own_value_is_left_out() -> None:
    """As in a sweep: such a position starts nothing, and a cell with none left is the base run."""
    lm, site = tiny.lm("llama"), "layers.1.resid_pre"
    batch, asked = lm.batch(ROWS), target(lm, lm.batch(ROWS), **WHOLE)
    longer, base = continued(lm, batch, asked), capture(lm, batch, site)[site]
    assert longer.moved(replaced(site, base), base) == []
    other = base.clone()
    other[0, 4] += 1
    [change] = longer.moved(replaced(site, other), base)
    assert change.examples == [row for row, e in enumerate(longer.example.tolist()) if e == 0]
    assert set(torch.as_tensor(change.positions)[change.examples].flatten().tolist()) == {4}
    found = swept(lm, batch, [replaced(site, other), replaced(site, base)], asked)
    expected = under(blocks(lm)[0][1], lambda s: s[4].add_(1), lm.model, ROWS[0])
    assert float(found[0, 0]) == pytest.approx(expected, abs=1e-3)
    assert float(found[0, 1]) == float(found[1, 1])


def test_a_change_outside_is_part_of_it_unless_it_names_places() -> None:
    lm = tiny.lm("llama")
    stack, _ = blocks(lm)
    with intervene(lm, scaled("layers.1.resid_pre", 0.5)):
        found = occlusion.measure(lm, ROWS, **WHOLE).logit_difference
    for e, row in enumerate(ROWS):
        halved = under(stack[1], lambda s: s.mul_(0.5), lm.model, row)
        assert float(found[e]) == pytest.approx(halved, abs=1e-3)
    with (
        intervene(lm, scaled("layers.1.resid_pre", 0.5, positions=-1)),
        pytest.raises(InputError, match="names positions"),
    ):
        occlusion.measure(lm, ROWS, **WHOLE)


def test_who_listens_outside_hears_of_the_prompts_alone() -> None:
    lm, site = tiny.lm("llama"), "layers.1.resid_pre"
    with trace(lm, site) as seen:
        next_token.measure(lm, ROWS, **WHOLE)
    assert seen[site].shape == (2, 8, lm.dims.dim)
    with trace(lm, site) as heard:
        batch = lm.batch(ROWS)
        swept(lm, batch, [scaled(site, 1.5)], target(lm, batch, **WHOLE))
    assert not heard.reached(heard.sites[0])


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lm, file = tiny.lm("llama"), tmp_path / "sweep.safetensors"
    first = layers.measure(lm, ROWS, corrupt=CORRUPT, save=file, **WHOLE)
    calls: list[tuple[int, int]] = []
    again = layers.measure(
        lm, ROWS, corrupt=CORRUPT, save=file, progress=lambda *at: calls.append(at), **WHOLE
    )
    assert calls == []
    assert first.identical(again)


def test_texts_are_tokenised_whole() -> None:
    p = planted.copy_head()
    lm, words = wrap(p.model, p.tokenizer), list(p.tokenizer.get_vocab())
    text, ids = f"{words[5]} {words[6]}", [p.tokenizer.get_vocab()[w] for w in words[5:7]]
    # beside a whole, a text is one too
    asked = target(lm, lm.batch(p.clean), Whole(text), words[7])
    assert asked.tokens == ((tuple(ids), (p.tokenizer.get_vocab()[words[7]],)),)
    assert asked.answer_text == (text,)


@pytest.mark.parametrize(
    ("name", "answer", "foil", "reason"),
    [
        ("bert", Whole((5, 6)), Whole((7,)), "BertForMaskedLM .* is no causal language model"),
        ("llama", Whole((5, 6)), None, "no foil is given"),
        ("llama", None, Whole((5, 6)), "no answer"),
        ("llama", Whole((5, 6)), Whole((5, 6)), "the same 2 tokens"),
        ("llama", Whole(()), 7, "at least one"),
        ("llama", Whole((5, 96)), 7, "below 96"),
        ("llama", Whole(" Mary"), 7, "without a tokenizer"),
        ("llama", [Whole((5, 6))] * 3, 7, "3 answers for 2"),
        ("gpt2", Whole((5,) * 60), 7, "all but the last of an answer or foil are 67"),
    ],
)
def test_what_is_no_whole_question_is_refused(
    name: str, answer: Any, foil: Any, reason: str
) -> None:
    lm = tiny.lm(name)
    for measure in (next_token.measure, occlusion.measure):
        with pytest.raises((InputError, SiteError), match=reason):
            measure(lm, ROWS, answer=answer, foil=foil)
    for measure in (layers.measure, heads.measure):
        with pytest.raises((InputError, SiteError), match=reason):
            measure(lm, ROWS, corrupt=CORRUPT, answer=answer, foil=foil)


def test_images_are_refused() -> None:
    with pytest.raises(InputError, match="prompts of text alone; these bring pixel_values"):
        next_token.measure(tiny.lm("llava"), tiny.inputs("llava"), **WHOLE)


def test_each_of_some_examples_gets_its_own_value() -> None:
    """The value's first axis counts the examples that the cell names, not all of them."""
    lm, site = tiny.lm("llama"), "layers.0.resid_post"
    batch = lm.batch([*ROWS, CORRUPT[0]])
    value = torch.randn(2, 1, lm.dims.dim, generator=torch.Generator().manual_seed(0))
    together = replaced(site, value, positions=2, examples=[1, 2])
    one, other = (replaced(site, value[[n]], positions=2, examples=[n + 1]) for n in (0, 1))
    found = swept(lm, batch, [together, [one, other], one], target(lm, batch, **WHOLE))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0, 2], found[2, 2], atol=1e-2)


def test_what_follows_a_shorter_prompt_has_no_slope() -> None:
    """There stand tokens of the answers, on rows of a batch that is as wide as its longest."""
    lm = tiny.lm("llama")
    batch = lm.batch(ROWS)
    _, found = slope(lm, batch, target(lm, batch, **WHOLE))
    assert (found[1, len(ROWS[1]) :] == 0).all()
    assert (found[1, : len(ROWS[1])] != 0).any(dim=1).all()
