"""Forced attention is a row that sums to 1 and makes z of the named values, turns the answer of a
planted circuit round, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stratoscope.editing import force_attention
from stratoscope.engine.edit import Edit
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import (
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

EXAMPLE = {"edit": {"request": [(0, 3), (1, 0), (1, 1)], "keys": 0}}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", THREE)
def test_rows_sum_to_one_and_z_is_made_of_the_named_values(name: str, side: str) -> None:
    lm, keys, share = lm_of(name), [[1, 4], [0, 2]], torch.tensor([0.25, 0.75])
    sites = [f"layers.1.attn.{point}" for point in ("pattern", "v", "z")]
    edit = force_attention.edit(lm, [(1, 0), (1, 3)], keys=keys, weights=share.tolist())
    plain = capture(lm, padded(ROWS, side), *sites)
    with untouched(lm), edit:
        seen = capture(lm, padded(ROWS, side), *sites)
    pattern, v, z = (seen[site] for site in sites)
    assert v.equal(plain[sites[1]])
    group = lm.dims.heads // v.shape[2]
    for example, row in enumerate(ROWS):
        last = len(row) - 1
        for head in range(lm.dims.heads):
            forced = pattern[example, head, last]
            close(forced.sum(), 1, 1e-6)
            if head in (0, 3):
                assert forced[keys[example]].tolist() == share.tolist()
            value = v[example, :, head // group]
            close(z[example, last, head], forced[: len(value)] @ value, 1e-6)
        # no other query, and no other head
        for other in (1, 2):
            assert pattern[example, other].equal(plain[sites[0]][example, other])
        assert pattern[example, :, :last].equal(plain[sites[0]][example, :, :last])


@pytest.mark.parametrize("name", THREE)
def test_equals_plain_hook(name: str) -> None:
    """z is a mean of two values: what o_proj is given when a prompt's head can see one token only
    is that token's value, so values are read by plain hooks from the prompts cut short."""
    lm, size, head = lm_of(name), lm_of(name).dims.head_dim, 2
    here = slice(head * size, (head + 1) * size)
    with force_attention.edit(lm, [(0, head)], keys=[0, 2]):
        found = last_logits(lm, padded(ROWS, "left"))
    config = lm.model.config
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    expected = []
    for row in ROWS:
        # in layer 0 a value is of its own token and place: v_proj's output, by a plain hook
        out = []
        if name == "gpt2":
            module, start = lm.model.transformer.h[0].attn.c_attn, 2 * lm.dims.heads + head
        else:
            module = lm.model.model.layers[0].self_attn.v_proj
            start = head // (lm.dims.heads // kv)
        keep = lambda _, args, x, out=out: out.append(x[0].clone())  # noqa: E731
        hook = module.register_forward_hook(keep)
        with torch.no_grad():
            lm.model(torch.tensor([row]))
        hook.remove()
        value = out[0][[0, 2], start * size : (start + 1) * size].mean(dim=0)

        def change(x: torch.Tensor, value: torch.Tensor = value) -> None:
            x[-1, here] = value

        expected.append(logits_with(lm, parts(lm, 0)[0], row, change))
    close(found, torch.stack(expected), 1e-4)
    assert not torch.allclose(found, last_logits(lm, padded(ROWS, "left")), atol=1e-3)
    assert entering(lm, parts(lm, 0)[0], ROWS[0]).shape[1] == lm.dims.heads * size


def test_the_planted_head_forced_onto_the_foil_turns_the_answer_round() -> None:
    p = planted.indirect_object()
    lm = wrap(p.model, p.tokenizer)
    some = p.variants(6, seed=1)
    prompts = [v.clean for v in some]
    asked = target(lm, prompts, [v.answer for v in some], [v.foil for v in some])
    places = [[v.clean.split().index(v.foil)] for v in some]
    ask = lambda: asked.difference(last_logits(lm, prompts))  # noqa: E731
    before = ask()
    assert (before > 5).all()
    with untouched(lm):
        with force_attention.edit(lm, [(2, 3)], keys=places):
            assert (ask() < -5).all()
        right = [[v.clean.split().index(v.answer)] for v in some]
        with force_attention.edit(lm, [(2, 3)], keys=right):
            assert (ask() > 5).all()
        for other in range(3):
            with force_attention.edit(lm, [(2, other)], keys=places):
                assert (ask() > 5).all()
    site = "layers.2.attn.scores"  # the wrong thing: the same numbers, before softmax
    scores = [
        replaced(site, 0.0, positions=-1, units=[3]),
        replaced(site, 1.0, positions=-1, keys=places, units=[3]),
    ]
    with intervene(lm, *scores):
        pattern = capture(lm, prompts, "layers.2.attn.pattern")["layers.2.attn.pattern"]
    spread = [float(pattern[n, 3, len(p.split()) - 1, places[n][0]]) for n, p in enumerate(prompts)]
    assert max(spread) < 0.5


def test_queries_are_the_prompts_while_generating() -> None:
    lm = lm_of("llama")
    with force_attention.edit(lm, [(0, 0), (1, 1)], keys=0):
        first = last_logits(lm, ROWS[:1]).argmax(dim=-1)
        [said] = generate(lm, ROWS[:1], tokens=2)
    assert said[0] == first[0]
    longer = [[*ROWS[0], int(said[0])]]
    with force_attention.edit(lm, [(0, 0), (1, 1)], queries=len(ROWS[0]) - 1, keys=0):
        assert said[1] == last_logits(lm, longer).argmax(dim=-1)[0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    lm = lm_of("gemma2")
    edit = force_attention.edit(lm, [(2, 1), (0, 2)], queries=[3, 4], keys=[[1, 0], [2, 3]])
    edit.save(tmp_path / "forced.safetensors")
    loaded = Edit.load(lm, tmp_path / "forced.safetensors")
    assert loaded.note == edit.note == "attention of L2H1, L0H2 forced"
    with edit:
        expected = last_logits(lm, ROWS)
    with loaded:
        assert torch.equal(last_logits(lm, ROWS), expected)
    assert not torch.equal(last_logits(lm, ROWS), expected)


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in ([], [(1,)], [(1, 2, 3)]):
        with pytest.raises(InputError, match=r"\(layer, head\), at least one"):
            force_attention.edit(lm, wrong, keys=0)
    with pytest.raises(InputError, match="head 4 of layer 0: this model has 0 to 3"):
        force_attention.edit(lm, [(0, 4)], keys=0)
    with pytest.raises(SiteError, match="layer 3 of 3"):
        force_attention.edit(lm, [(3, 0)], keys=0)
    for weights, said in (
        ([0.5], "1 weights for 2"),
        ([0.5, 0.6], "sum to 1.1"),
        ([2.0, -1.0], "0 or"),
    ):
        with pytest.raises(InputError, match=said):
            force_attention.edit(lm, [(0, 0)], keys=[0, 1], weights=weights)
    with pytest.raises(InputError, match="named twice"):
        force_attention.edit(lm, [(0, 0)], keys=[1, 1])
    with pytest.raises(InputError, match="from the same end"):
        force_attention.edit(lm, [(0, 0)], keys=[0, -1])
    with pytest.raises(InputError, match="name the tokens"):
        force_attention.edit(lm, [(0, 0)], keys=None)
    for queries, keys in ((2, [1, 3]), (-2, -1), (None, 1)):
        with pytest.raises(InputError, match="sees a later one"):
            force_attention.edit(lm, [(0, 0)], queries=queries, keys=keys)
    with pytest.raises(InputError, match="keys of 3 examples, and queries of 2"):
        force_attention.edit(lm, [(0, 0)], queries=[[1], [2]], keys=[[0], [1], [0]])
    force_attention.edit(lm_of("bert"), [(0, 0)], queries=0, keys=3)  # it looks both ways
    with (
        untouched(lm),
        pytest.raises(InputError, match="outside example 1"),
        force_attention.edit(lm, [(0, 0)], keys=6),
    ):
        lm(ROWS)
