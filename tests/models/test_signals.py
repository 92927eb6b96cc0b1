"""Encoders of float series: what plain Transformers says of them, padded and alone, and what must
be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.intervene import ablate, intervene, replaced, scaled
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import FamilyError, InputError
from stratoscope.layers import logit_lens
from stratoscope.models import wrap
from stratoscope.models.family import into, out_of
from stratoscope.models.prove import checks
from stratoscope.models.trials import PADDING
from support import tiny
from support import zoo_signals as zoo

TOLERANCE = 1e-5


def plain(name: str) -> Any:
    model = zoo.model(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**zoo.arguments(name), output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_invariant_holds(name: str) -> None:
    lm = zoo.lm(name)
    found = checks(lm, zoo.inputs(name))
    assert [c for c in found if not c.holds] == []
    assert (PADDING in {c.name for c in found}) == (name in zoo.SOUND)
    assert {"pattern @ v == z", "bidirectional"} < {c.name for c in found}


@pytest.mark.parametrize("name", zoo.ALL)
def test_states_and_attentions_are_hugging_face_s(name: str) -> None:
    lm, said = zoo.lm(name), plain(name)
    batch = lm.batch(zoo.inputs(name))
    seen = capture(lm, batch, *lm.sites())
    depth = lm.dims.layers
    real = batch.mask
    if real is None:
        real = torch.ones(seen["layers.0.resid_pre"].shape[:2], dtype=torch.bool)
    for layer in range(depth):
        state = said.hidden_states[layer]
        state = state.flatten(0, 1) if name in zoo.SERIES else state
        own = seen[f"layers.{layer}.resid_pre"]
        assert own.shape == state.shape
        assert tiny.gap(own[real], state[real]) < TOLERANCE
        pattern, weights = seen[f"layers.{layer}.attn.pattern"], said.attentions[layer]
        rows = real[:, None, :, None].expand_as(pattern)
        assert tiny.gap(pattern[rows], weights[rows]) < TOLERANCE
    if name not in zoo.SERIES:
        assert tiny.gap(seen["logits"][real], said.logits[real]) < TOLERANCE
        last = seen[f"layers.{depth - 1}.resid_post"]
        assert tiny.gap(lm.readout(last)[real], said.logits[real]) < TOLERANCE


@pytest.mark.parametrize("name", zoo.SOUND)
def test_batched_equals_single_with_unequal_lengths(name: str) -> None:
    lm = zoo.lm(name)
    batch = lm.batch(zoo.inputs(name))
    assert batch.lengths.tolist() == [9, 6, 4]
    sites = ("layers.*.resid_post", "layers.*.attn.pattern", "logits")
    seen, mapped = capture(lm, batch, *sites), capture(lm, zoo.arguments(name), *sites)
    last = capture(lm, batch, "layers.1.resid_post", positions=-1)["layers.1.resid_post"]
    for row, series in enumerate(zoo.inputs(name)):
        with torch.no_grad():
            said = zoo.model(name)(input_values=series[None]).logits[0]
        alone, n = capture(lm, series, *sites), int(batch.lengths[row])
        one = capture(lm, batch.example(row), *sites)
        assert tiny.gap(seen["logits"][row, :n], said) < TOLERANCE
        for site in lm.layout.resolve(sites):
            got = seen[site][row]
            got = got[:, :n, :n] if "key" in site.axes else got[:n]
            for other in (alone, one):
                assert tiny.gap(got, other[site][0]) < TOLERANCE, site
            assert torch.equal(seen[site], mapped[site])
        assert tiny.gap(last[row], alone["layers.1.resid_post"][0, -1]) < TOLERANCE


def test_one_frame_of_each_series_is_changed_and_measured() -> None:
    """Positions are frames; sweeps, the lens and means ask about them as of tokens."""
    lm = zoo.lm("wav2vec2 stable")
    batch = lm.batch(zoo.inputs("wav2vec2 stable"))
    base = capture(lm, batch, "layers.0.attn.z", "layers.0.resid_post")
    with intervene(lm, ablate("layers.0.attn.z", positions=-1, units=[2])):
        changed = capture(lm, batch, "layers.0.attn.z")["layers.0.attn.z"]
    for row, n in enumerate((9, 6, 4)):
        assert float(changed[row, n - 1, 2].abs().max()) == 0
        kept = torch.arange(9) != n - 1
        assert torch.equal(changed[row, kept], base["layers.0.attn.z"][row, kept])
    cells = [ablate(f"layers.{n}.attn.z", units=[h], positions=1) for n in (0, 1) for h in (0, 3)]
    cells.append(scaled("layers.1.mlp.out", 2.0))
    metric = lambda logits, example: logits[:, 7] - logits[:, 10]  # noqa: E731
    got, expected = sweep(lm, batch, cells, metric), naive(lm, batch, cells, metric)
    assert tiny.gap(got, expected) < TOLERANCE
    with pytest.raises(InputError, match=r"hold no token ids"):
        logit_lens.measure(lm, batch)
    seen = capture(lm, batch, "layers.0.resid_post")
    own = seen["layers.0.resid_post"][batch.mask].mean(dim=0)
    assert tiny.gap(seen.mean("layers.0.resid_post"), own) < TOLERANCE


@pytest.mark.parametrize("name", zoo.SERIES)
def test_channels_are_the_rows_of_an_example(name: str) -> None:
    """An intervention at one example changes all its channels, and no other example."""
    lm, given = zoo.lm(name), zoo.inputs(name)
    base = capture(lm, given, "layers.1.resid_post")["layers.1.resid_post"]
    assert base.shape[:2] == (6, 6 + (name == "patchtst post-norm"))
    value = torch.randn(1, base.shape[1], 32, generator=torch.Generator().manual_seed(5))
    with intervene(lm, replaced("layers.0.resid_mid", value, examples=[1])):
        seen = capture(lm, given, "layers.0.resid_mid", "layers.1.resid_post")
    assert torch.allclose(seen["layers.0.resid_mid"][2:4], value.expand(2, -1, -1), atol=1e-6)
    changed = (seen["layers.1.resid_post"] - base).flatten(1).abs().max(dim=1).values > 1e-4
    assert changed.tolist() == [False, False, True, True, False, False]
    with torch.no_grad():
        moved = dict(given, past_values=given["past_values"].clone())
        moved["past_values"][1, :, 0] = given["past_values"][2, :, 0]
    other = capture(lm, moved, "layers.1.resid_post")["layers.1.resid_post"]
    assert tiny.gap(other[2], base[4]) < TOLERANCE
    assert tiny.gap(other[3], base[3]) < TOLERANCE


def test_series_that_cannot_be_read_are_refused_by_name() -> None:
    lm, alone = zoo.lm("wav2vec2"), zoo.lm("wav2vec2 grouped")
    with pytest.raises(InputError, match=r"\[60, 41, 33\] steps in one batch.*padding"):
        alone.batch(zoo.inputs("wav2vec2"))
    with pytest.raises(InputError, match=r"too short for one position"):
        lm.batch([torch.randn(60), torch.randn(4)])
    with pytest.raises(InputError, match=r"series of finite floats; got str 'hello'"):
        lm.batch("hello")
    with pytest.raises(InputError, match=r"takes `input_values`.*got 'input_ids'"):
        lm.batch({"input_ids": [[3, 4]]})
    with pytest.raises(InputError, match=r"padding at the end"):
        lm.batch({"input_values": torch.randn(1, 60), "attention_mask": [[0] * 30 + [1] * 30]})
    made = hf.PatchTSTModel(hf.PatchTSTConfig(d_model=32, ffn_dim=48, channel_attention=True))
    with pytest.raises(FamilyError, match=r"`channel_attention`.*refused"):
        wrap(made)


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2 stable", "patchtst"])
def test_a_wrong_table_is_found_out(name: str) -> None:
    known = zoo.lm(name).family
    tower = known.towers[""]
    wrong = [
        {"points": {"attn.out": into(tower.attn_write[0])}},
        {"points": {"mlp.out": out_of(tower.points["mlp.pre"].path)}},
        {"points": {"mlp.act": into(tower.points["mlp.pre"].path)}},
        {"causal": True},
    ]
    if tower.norms:
        wrong.append({"norms": tower.norms[::-1]})
    for changes in wrong:
        table = replace(known, towers={"": tower.but(**changes)})
        with pytest.raises(FamilyError):
            wrap(zoo.model(name), family=table)


@pytest.mark.parametrize("name", zoo.ALONE)
def test_padding_that_reaches_a_frame_is_found_out(name: str) -> None:
    """A grouped norm sees the padding: a table that says otherwise is refused."""
    table = zoo.lm(name).family
    leaks = replace(table, towers={"": table.towers[""].but(alone=False)})
    with pytest.raises(FamilyError, match=r"lets padding through"):
        wrap(zoo.model(name), family=leaks)
