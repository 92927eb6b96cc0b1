"""Encoder-decoders: what plain Transformers says of them, at every site of both towers, and wrong
tables that must be found out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import ablate, intervene, replaced, scaled
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, InputError, SiteError
from stratoscope.models import wrap
from stratoscope.models.family import Family, Point, into, out_of
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from stratoscope.models.sites import POINTS
from stratoscope.models.specimen import specimens
from stratoscope.models.trials import PADDING
from support import zoo_towers as zoo

TOLERANCE = 1e-5
WITNESSES = ("t5", "bart", "whisper")


def plain(name: str, row: int | None = None, **options: Any) -> Any:
    """Hugging Face's own run under its eager kernel, which gives attention weights."""
    model = zoo.model(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(
            **zoo.arguments(name, row),
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
            **options,
        )


# --- what holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_invariant_holds(name: str) -> None:
    lm = zoo.lm(name)
    found = checks(lm, zoo.batch(name))
    assert [c for c in found if not c.holds] == []
    names = {c.name for c in found}
    assert {"softmax(scores) == pattern", "cross-attention reads the source", PADDING} < names
    depth = lm.dims.layers
    crosses = [c for c in found if c.name == "W(cross.z) == cross.out"]
    assert [c.place for c in crosses] == [f"layers.{n}.cross.out" for n in range(depth)]
    assert sum(c.place.startswith("encoder.") for c in found) >= 4


@pytest.mark.parametrize("name", WITNESSES)
def test_states_and_attentions_are_hugging_face_s(name: str) -> None:
    lm, batch, said = zoo.lm(name), zoo.batch(name), plain(name)
    seen = capture(lm, batch, *lm.sites())
    real, heard = batch.mask, batch.source.mask
    heard = torch.ones(3, 9, dtype=torch.bool) if heard is None else heard
    for tower, states, weights, mask in (
        ("decoder", said.decoder_hidden_states, said.decoder_attentions, real),
        ("encoder", said.encoder_hidden_states, said.encoder_attentions, heard),
    ):
        depth = len(weights)
        assert depth == lm.layout.dims["" if tower == "decoder" else tower].layers
        for layer in range(depth):
            at = f"{tower}.layers.{layer}"
            assert zoo.gap(seen[f"{at}.resid_pre"][mask], states[layer][mask]) < TOLERANCE
            got, own = seen[f"{at}.attn.pattern"], weights[layer]
            rows = mask[:, None, :, None].expand_as(own)
            assert zoo.gap(got[rows], own[rows]) < TOLERANCE
    for layer, own in enumerate(said.cross_attentions):
        rows = real[:, None, :, None].expand_as(own)
        got = seen[f"decoder.layers.{layer}.cross.pattern"]
        assert got.shape == own.shape == (3, 4, real.shape[1], heard.shape[1])
        assert zoo.gap(got[rows], own[rows]) < TOLERANCE
    assert zoo.gap(seen["logits"][real], said.logits[real]) < TOLERANCE
    assert (
        zoo.gap(lm.readout(seen.stack("layers.*.resid_post")[-1])[real], said.logits[real]) < 1e-5
    )


@pytest.mark.parametrize("name", WITNESSES)
def test_batched_equals_single_with_unequal_lengths_on_both_sides(name: str) -> None:
    lm, batch = zoo.lm(name), zoo.batch(name)
    points = ("cross.pattern", "cross.out", "resid_post")
    sites = [f"layers.*.{p}" for p in points] + ["encoder.layers.*.resid_post", "logits"]
    seen = capture(lm, batch, *sites)
    for row in range(3):
        alone = capture(lm, batch.example(row), *sites)
        n = int(batch.lengths[row])
        m = alone["encoder.layers.0.resid_post"].shape[1]
        for site in lm.layout.resolve(sites):
            got, own = seen[site][row], alone[site][0]
            got = got[:m] if site.tower else got[:, :n, :m] if "key" in site.axes else got[:n]
            assert zoo.gap(got, own) < TOLERANCE, site
        said = plain(name, row).logits[0]
        assert zoo.gap(seen["logits"][row, :n], said) < TOLERANCE
    ends_at = ("encoder.layers.0.resid_post", "layers.0.cross.k")
    last, whole = capture(lm, batch, *ends_at, positions=-1), capture(lm, batch, *ends_at)
    ends = [8] * 3 if batch.source.mask is None else (batch.source.lengths - 1).tolist()
    for site in ends_at:
        expected = whole[site][torch.arange(3), torch.tensor(ends)]
        assert torch.equal(last[site], expected)


# --- what is changed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITNESSES)
def test_interventions_do_what_plain_hooks_do(name: str) -> None:
    lm, batch = zoo.lm(name), zoo.batch(name)
    attention = {"t5": "layer.1.EncDecAttention"}.get(name, "encoder_attn")
    layer = lm.layout.layers[""][1]
    projection = layer.get_submodule(f"{attention}.{'o' if name == 't5' else 'out_proj'}")

    def silenced(module: Any, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., 8:16] = 0
        return (z,)

    hook = projection.register_forward_pre_hook(silenced)
    try:
        expected = lm(batch).logits
    finally:
        hook.remove()
    with intervene(lm, ablate("decoder.layers.1.cross.z", units=[1])):
        got = lm(batch).logits
    assert zoo.gap(got[batch.mask], expected[batch.mask]) < TOLERANCE
    assert zoo.gap(got[batch.mask], lm(batch).logits[batch.mask]) > 1e-4

    def halved(module: Any, args: tuple, output: Any) -> Any:
        return (output[0] / 2, *output[1:])

    hook = layer.get_submodule(attention).register_forward_hook(halved)
    try:
        expected = lm(batch).logits
    finally:
        hook.remove()
    with intervene(lm, scaled("layers.1.cross.out", 0.5)):
        got = lm(batch).logits
    assert zoo.gap(got[batch.mask], expected[batch.mask]) < TOLERANCE


@pytest.mark.parametrize("name", WITNESSES)
def test_what_the_encoder_and_the_keys_are_given_reaches_the_decoder(name: str) -> None:
    """A patch of all of another source's encoder, or of every layer's cross keys and values, makes
    the decoder say what it says of that source."""
    lm, batch = zoo.lm(name), zoo.batch(name)
    other = lm.batch(
        {k: v.roll(1, 0) for k, v in batch.source.forward_arguments().items()}
        if name == "whisper"
        else [zoo.SOURCES[0][::-1], zoo.SOURCES[1][::-1], zoo.SOURCES[2][::-1]],
        target=zoo.SAID,
    )
    depth = lm.layout.dims["encoder"].layers
    last = f"encoder.layers.{depth - 1}.resid_post"
    seen = capture(lm, other, last, "layers.*.cross.k", "layers.*.cross.v")
    expected, base = lm(other).logits[batch.mask], lm(batch).logits[batch.mask]
    assert zoo.gap(base, expected) > 1e-3
    with intervene(lm, replaced(last, seen[last])):
        assert zoo.gap(lm(batch).logits[batch.mask], expected) < TOLERANCE
    keys = [
        replaced(s, seen[s]) for s in lm.layout.resolve(["layers.*.cross.k", "layers.*.cross.v"])
    ]
    with intervene(lm, *keys):
        assert zoo.gap(lm(batch).logits[batch.mask], expected) < TOLERANCE
    with intervene(lm, *keys[:1]):
        assert zoo.gap(lm(batch).logits[batch.mask], expected) > 1e-4


@pytest.mark.parametrize("name", WITNESSES)
def test_a_cut_key_is_a_source_position_of_each_example(name: str) -> None:
    """keys=-1 is the last real position of each source: its column of the pattern is gone."""
    lm, batch = zoo.lm(name), zoo.batch(name)
    base = capture(lm, batch, "layers.0.cross.pattern")["layers.0.cross.pattern"]
    cut = replaced("layers.0.cross.scores", -torch.inf, keys=-1, positions=[0, 1])
    with intervene(lm, cut):
        seen = capture(lm, batch, "layers.0.cross.pattern")["layers.0.cross.pattern"]
    ends = [8] * 3 if batch.source.mask is None else (batch.source.lengths - 1).tolist()
    for row, end in enumerate(ends):
        assert float(seen[row, :, :2, end].abs().max()) == 0
        rest = base[row, :, :2].clone()
        rest[..., end] = 0
        expected = rest / rest.sum(dim=-1, keepdim=True)
        assert zoo.gap(seen[row, :, :2], expected) < TOLERANCE
    assert torch.equal(seen[:, :, 2:], base[:, :, 2:])


def test_resid_mid_is_edited_after_cross_attention() -> None:
    """Whisper's is a sum that no module receives: an edit reaches the MLP and the stream alike."""
    lm, batch = zoo.lm("whisper"), zoo.batch("whisper")
    other = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3))
    with intervene(lm, replaced("layers.0.resid_mid", other)):
        seen = capture(lm, batch, "layers.0.resid_mid", "layers.0.mlp.out", "layers.0.resid_post")
    assert torch.allclose(seen["layers.0.resid_mid"], other, atol=1e-6)
    layer = lm.layout.layers[""][0]
    with torch.no_grad():
        x = layer.final_layer_norm(other)
        expected = layer.fc2(layer.activation_fn(layer.fc1(x)))
    assert zoo.gap(seen["layers.0.mlp.out"], expected) < TOLERANCE
    assert zoo.gap(seen["layers.0.resid_post"], other + expected) < TOLERANCE


# --- how inputs are given -------------------------------------------------------------------------


def test_without_a_target_the_decoder_begins_with_its_start_token() -> None:
    lm = zoo.lm("bart")
    batch = lm.batch(zoo.SOURCES)
    assert batch.ids.tolist() == [[2]] * 3
    with torch.no_grad():
        given = {k: v for k, v in zoo.arguments("bart").items() if "decoder" not in k}
        own = zoo.model("bart")(**given, decoder_input_ids=torch.tensor([[2]] * 3)).logits
    assert zoo.gap(lm(batch).logits, own) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mapping_of_both_is_read_whatever_side_it_is_padded_on(side: str) -> None:
    lm, given = zoo.lm("t5"), zoo.arguments("t5")
    if side == "left":
        given = {key: zoo.left(x, given[zoo.mask_of(key)]) for key, x in given.items()}
    batch = lm.batch(given)
    assert torch.equal(batch.mask, zoo.batch("t5").mask)
    real = batch.mask
    assert zoo.gap(lm(batch).logits[real], plain("t5").logits[real]) < TOLERANCE


def test_wrong_inputs_are_refused_by_name() -> None:
    t5, whisper = zoo.lm("t5"), zoo.lm("whisper")
    with pytest.raises(InputError, match=r"3 inputs and 2 targets"):
        t5.batch(zoo.SOURCES, target=zoo.SAID[:2])
    with pytest.raises(InputError, match=r"`labels`.*`decoder_input_ids`"):
        t5.batch({"input_ids": [[3, 4]], "labels": [[5, 6]]})
    with pytest.raises(InputError, match=r"give one of them"):
        t5.batch({"input_ids": [[3, 4]], "decoder_input_ids": [[0, 6]]}, target=[[6]])
    with pytest.raises(InputError, match=r"`input_features` are series of finite floats; got list"):
        whisper.batch([[3, 4]])
    with pytest.raises(InputError, match=r"this batch has its own"):
        t5.batch(zoo.batch("t5"), target=[[6]])
    with pytest.raises(SiteError, match=r"no vision tower.*`encoder.` for its encoder tower"):
        t5.sites("vision.layers.0.attn.z")
    with pytest.raises(SiteError, match=r"encoder.layers.0.cross.z.*read no other tower"):
        t5.sites("encoder.layers.0.cross.z")


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5 gated", "bart"])
def test_generation_equals_hugging_face_s_and_is_intervened_in_at_every_step(name: str) -> None:
    lm, model = zoo.lm(name), zoo.model(name)
    given = {k: v for k, v in zoo.arguments(name).items() if "decoder" not in k}
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    with torch.no_grad():
        own = model.generate(**given, decoder_input_ids=start, **options)[:, 1:]
    with trace(lm, "layers.1.cross.pattern", "encoder.layers.0.resid_post", stop=False) as seen:
        new = generate(lm, zoo.SOURCES, tokens=5, min_new_tokens=5)
    assert [row.tolist() for row in new] == own.tolist()
    assert len(seen.steps("encoder.layers.0.resid_post")) == 1
    steps = seen.steps("layers.1.cross.pattern")
    assert [x.shape for x in steps] == [(3, 4, 1, 7)] * 5
    # the same, run whole: the pattern of the last new token
    whole = lm.batch(zoo.SOURCES, target=[row[:-1].tolist() for row in new])
    last = capture(lm, whole, "layers.1.cross.pattern", positions=-1)["layers.1.cross.pattern"]
    assert zoo.gap(steps[-1][:, :, 0], last) < TOLERANCE
    # keys of the source stay cut at every step
    cut = replaced("layers.*.cross.scores", -torch.inf, keys=-1)
    gone = replaced("layers.*.cross.v", 0.0, positions=-1)
    for change in (cut, gone):
        with intervene(lm, change):
            made = generate(lm, zoo.SOURCES, tokens=4, min_new_tokens=4)
            whole = lm.batch(zoo.SOURCES, target=[row[:-1].tolist() for row in made])
            said = lm(whole).logits[:, :-1].argmax(-1)
        told = lm(lm.batch(zoo.SOURCES, target=[r.tolist() for r in made])).logits
        assert said.shape == (3, 3)
        with intervene(lm, change):
            again = lm(lm.batch(zoo.SOURCES, target=[r.tolist() for r in made])).logits
        for step in range(4):
            row = again[:, step].clone()
            row[:, [model.config.eos_token_id]] = -torch.inf  # min_new_tokens
            assert row.argmax(-1).tolist() == [r[step].item() for r in made]
        assert zoo.gap(again, told) > 1e-4


def test_whisper_goes_on_from_what_has_been_said() -> None:
    """As its forward says token by token, at positions that keep their numbers."""
    lm = zoo.lm("whisper")
    said = [[5, 7], [23, 29], [31, 37]]
    batch = lm.batch(zoo.source("whisper"), target=said)
    with trace(lm, "layers.1.cross.pattern", stop=False) as seen:
        new = generate(lm, batch, tokens=4, eos_token_id=95)
    rows = [list(row) for row in said]
    for _ in range(4):
        logits = lm(lm.batch(zoo.source("whisper"), target=rows)).logits[:, -1]
        rows = [[*row, int(token)] for row, token in zip(rows, logits.argmax(-1))]
    assert [row.tolist() for row in new] == [row[2:] for row in rows]
    assert seen.steps("layers.1.cross.pattern")[0].shape == (3, 4, 3, 9)


def test_targets_of_unequal_length_are_not_generated_from() -> None:
    with pytest.raises(InputError, match=r"targets of \[6, 3, 4\] tokens in one batch"):
        generate(zoo.lm("bart"), zoo.batch("bart"), tokens=2)


# --- what must be found out -----------------------------------------------------------------------


def wrong(name: str, **changes: Any) -> Family:
    """The family with another decoder."""
    known = zoo.lm(name).family
    return replace(known, towers=known.towers | {"": known.towers[""].but(**changes)})


def swapped(name: str) -> Family:
    """Self-attention's points under `cross.`, and the other way round."""
    points = zoo.lm(name).family.towers[""].points
    turn = {"attn": "cross", "cross": "attn"}
    found = {}
    for point, where in points.items():
        kind, dot, rest = point.partition(".")
        found[f"{turn.get(kind, kind)}{dot}{rest}"] = where
    decoder = zoo.lm(name).family.towers[""]
    return wrong(name, points=found, attn_write=decoder.cross_write, cross_write=decoder.attn_write)


CROSS_OUT = {"t5": "layer.1.EncDecAttention.o", "bart": "encoder_attn.out_proj"}
CROSS = [point for point in POINTS if point.startswith("cross.")]
WRONG = {
    "self and cross exchanged": swapped,
    "no cross-attention": lambda name: wrong(name, lacks=dict.fromkeys(CROSS, "none is seen")),
    "z of self-attention": lambda name: wrong(
        name, points={"cross.z": zoo.lm(name).family.towers[""].points["attn.z"]}
    ),
    "written by another projection": lambda name: wrong(
        name, cross_write=zoo.lm(name).family.towers[""].attn_write
    ),
    "resid_mid before cross-attention": lambda name: wrong(
        name,
        points={"resid_mid": out_of("layer.0" if name == "t5" else "self_attn_layer_norm")},
    ),
    "cross.out before the projection": lambda name: wrong(
        name, points={"cross.out": into(CROSS_OUT[name])}
    ),
    "a causal encoder's place": lambda name: replace(
        zoo.lm(name).family,
        towers=zoo.lm(name).family.towers | {"": zoo.lm(name).family.towers[""].but(causal=False)},
    ),
}


@pytest.mark.parametrize("table", WRONG)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_wrong_table_is_found_out(name: str, table: str) -> None:
    family = WRONG[table](name)
    with pytest.raises(FamilyError):
        _prove(LM(zoo.model(name), family))


def _prove(lm: LM) -> None:
    for given in specimens(lm):
        prove(lm, given)


def test_wrong_norms_and_scales_are_found_out() -> None:
    """BART's norms in another order; T5's logits unscaled; BART's bias of logits forgotten; the sum
    begun too early in Whisper."""
    norms = zoo.lm("bart").family.towers[""].norms
    for family in (
        wrong("bart", norms=(norms[1], norms[0], norms[2])),
        replace(zoo.lm("bart").family, logit_bias=""),
    ):
        with pytest.raises(FamilyError):
            wrap(zoo.model("bart"), family=family)
    with pytest.raises(FamilyError):
        wrap(zoo.model("t5"), family=replace(zoo.lm("t5").family, logit_scale=1.0))
    with pytest.raises(FamilyError):
        wrap(zoo.model("whisper"), family=wrong("whisper", points={"resid_mid": Point("", "sum")}))
