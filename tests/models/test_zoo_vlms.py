"""Vision-language models: one rule joins a text stack and a vision tower; proved on prompts with
and without a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.alone import Layers
from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import ablate, intervene, replaced
from stratoscope.engine.sent import sent
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, InputError
from stratoscope.models import families, wrap
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from support import tiny
from support import zoo_encoders as zoo
from support import zoo_vlms as vlms
from support.nightly import by_night


@pytest.mark.parametrize("name", by_night(vlms.WORDS))
def test_every_invariant_holds_without_a_picture(name: str) -> None:
    lm = vlms.lm(name)
    # padded; and alone, where a kernel may need no mask
    for prompts in vlms.PROMPTS, vlms.PROMPTS[:1]:
        found = checks(lm, prompts)
        assert [c for c in found if not c.holds] == []
        assert len(found) >= 6 * lm.dims.layers


@pytest.mark.parametrize("name", by_night(vlms.PICTURES))
def test_every_invariant_holds_with_a_picture(name: str) -> None:
    lm = vlms.lm(name)
    found = checks(lm, vlms.inputs(name))
    assert [c for c in found if not c.holds] == []
    assert sum(c.place.startswith("vision.") for c in found) >= 4 * lm.layout.dims["vision"].layers


def sound() -> dict[str, torch.Tensor]:
    """Two prompts with a sound each, the second of half the length."""
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    long, short = [1, *[tiny.IMAGE] * 8, 3, 4], [1, *[tiny.IMAGE] * 4, 5, 6]
    return {
        "input_ids": torch.tensor([long, [*short, *[0] * 4]]),
        "attention_mask": torch.tensor([[1] * 11, [*[1] * 7, *[0] * 4]]),
        "input_features": features,
        "feature_attention_mask": torch.tensor([[1] * 32, [*[1] * 16, *[0] * 16]]),
    }


@torch.no_grad()
def test_the_ear_is_hugging_face_s_and_every_invariant_holds_with_a_sound() -> None:
    lm, given = vlms.lm("qwen2_audio"), sound()
    found = [c for c in checks(lm, given) if c.place.startswith("audio.")]
    assert len(found) >= 8 * lm.layout.dims["audio"].layers
    assert [c for c in found if not c.holds] == []
    assert sum("audio" in s and "pattern" in s for s in map(str, lm.sites())) == 2
    one = lm.batch(given).example(0)
    ear = zoo.build(vlms.ALL["qwen2_audio"]).model.audio_tower
    plain = ear(given["input_features"][:1], output_hidden_states=True).hidden_states
    seen = capture(lm, one, "audio.layers.*.resid_pre", "projector")
    for layer in range(2):
        assert tiny.gap(seen[f"audio.layers.{layer}.resid_pre"], plain[layer]) <= 1e-6
    entered = capture(lm, one, "layers.0.resid_pre")["layers.0.resid_pre"]
    assert tiny.gap(entered[one.image], seen["projector"][0]) <= 1e-6
    with intervene(lm, ablate("audio.layers.1.attn.z", units=[2])):
        changed = lm(one)["logits"]
    assert tiny.gap(changed, lm(one)["logits"]) > 1e-3


def test_an_ear_that_is_named_wrong_fails() -> None:
    lm = vlms.lm("qwen2_audio")
    ear = lm.family.towers["audio"]
    wrong = ear.but(points={"mlp.out": ear.points["attn.out"]})
    other = LM(lm.model, replace(lm.family, towers=lm.family.towers | {"audio": wrong}))
    assert any(c.place.startswith("audio.") and not c.holds for c in checks(other, sound()))


@pytest.mark.parametrize("name", by_night(vlms.PICTURES))
@torch.no_grad()
def test_stream_output_and_pattern_are_hugging_face_s(name: str) -> None:
    lm, given = vlms.lm(name), vlms.inputs(name)
    plain = zoo.build(vlms.ALL[name])(**given, output_hidden_states=True)
    said = plain.language_model_outputs if name == "blip-2" else plain
    seen = capture(lm, given, "layers.*.resid_pre", "layers.*.resid_post")
    assert tiny.gap(seen["layers.0.resid_pre"], said.hidden_states[0]) <= 1e-6
    for layer in range(1, lm.dims.layers):
        assert tiny.gap(seen[f"layers.{layer - 1}.resid_post"], said.hidden_states[layer]) <= 1e-6
        if name != "qwen3_vl":  # which adds to the stream between layers
            assert tiny.gap(seen[f"layers.{layer}.resid_pre"], said.hidden_states[layer]) <= 1e-6
    with trace(lm, *lm.sites(), stop=False):
        ours = lm(given)
    assert tiny.gap(ours["logits"], plain.logits) < 1e-5
    eager = zoo.build(vlms.ALL[name])
    eager.set_attn_implementation("eager")
    said = eager(**given, output_attentions=True)
    said = said.language_model_outputs if name == "blip-2" else said
    sites = [
        site for site in map(str, lm.sites()) if site.endswith("attn.pattern") and site[0] == "l"
    ]
    reported = [x for x in said.attentions if x is not None]
    assert len(reported) == len(sites) > 0
    seen = capture(lm, given, *sites)
    for site, pattern in zip(sites, reported):
        assert tiny.gap(seen[site], pattern) <= 1e-6


@pytest.mark.parametrize("name", by_night(vlms.PICTURES))
def test_the_projector_s_rows_stand_at_the_picture_s_tokens(name: str) -> None:
    lm, given = vlms.lm(name), vlms.inputs(name)
    seen = capture(lm, given, "projector", "layers.0.resid_pre")
    if name == "blip-2":  # OPT adds positions to what is embedded
        model = lm.model.language_model.model.decoder
        positions = model.embed_positions(given["attention_mask"], 0).detach()
        seen["layers.0.resid_pre"].sub_(positions)
    # windows change the order, LLaVA adds newlines
    there = seen["layers.0.resid_pre"][lm.batch(given).image]
    assert (
        float(torch.cdist(seen["projector"].flatten(0, -2), there).min(dim=1).values.max()) < 1e-4
    )


@pytest.mark.parametrize("name", by_night(vlms.WORDS))
def test_padded_equals_single(name: str) -> None:
    lm = vlms.lm(name)
    site = f"layers.{lm.dims.layers - 1}.resid_post"
    together = capture(lm, vlms.PROMPTS, site)[site]
    for row, prompt in enumerate(vlms.PROMPTS):
        assert tiny.gap(together[row, : len(prompt)], capture(lm, [prompt], site)[site][0]) < 2e-6


def metric(logits: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    return logits[:, 3] - logits[:, 5]


def cells(lm: LM) -> list[Any]:
    value = torch.randn(1, 1, lm.dims.dim, generator=torch.Generator().manual_seed(2))
    every = [
        replaced("layers.0.resid_pre", value, positions=[3]),
        replaced("layers.1.resid_pre", value, positions=[4]),
        replaced("layers.1.resid_mid", value, positions=[2]),
        ablate("layers.0.attn.z", units=[1]),
        ablate("layers.0.mlp.out", positions=[3]),
        [ablate("layers.0.attn.out", positions=[2]), ablate("layers.2.attn.out", positions=[-1])],
    ]
    lists = [cell if isinstance(cell, list) else [cell] for cell in every]
    return [cell for cell in lists if all(lm.layout.lack(change.site) is None for change in cell)]


@pytest.mark.parametrize("name", by_night(vlms.PICTURES))
def test_sweep_equals_naive_with_a_picture(name: str) -> None:
    lm, given = vlms.lm(name), vlms.inputs(name)
    slow = naive(lm, given, cells(lm), metric)
    assert tiny.gap(sweep(lm, given, cells(lm), metric), slow) < 1e-5
    assert len(torch.unique(slow)) > 4


@pytest.mark.parametrize(
    ("name", "ahead"), [("gemma3", True), ("paligemma", True), ("internvl", False)]
)
def test_whether_a_position_hears_later_ones_is_measured_on_the_prompt(
    name: str, ahead: bool
) -> None:
    """By hand: a change at the picture's last token reaches its first one, in one layer, or does
    not."""
    lm, given = vlms.lm(name), vlms.inputs(name)
    assert Layers(lm, lm.batch(given)).causal != ahead
    before = capture(lm, given, "layers.1.resid_pre")["layers.1.resid_pre"]
    value = torch.randn(1, 1, lm.dims.dim)
    with intervene(lm, replaced("layers.0.resid_pre", value, positions=[4])):
        after = capture(lm, given, "layers.1.resid_pre")["layers.1.resid_pre"]
    assert (tiny.gap(after[:, 1], before[:, 1]) > 1e-4) == ahead


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen3_vl", "lfm2_vl", "blip-2"])
def test_generation_with_a_picture_is_hugging_face_s(name: str) -> None:
    given = vlms.inputs(name)
    plain = zoo.build(vlms.ALL[name]).generate(**given, max_new_tokens=3, do_sample=False)
    [ours] = generate(vlms.lm(name), given, tokens=3)
    assert ours.tolist() == plain[0, -len(ours) :].tolist()


def test_deepstack_is_not_summed() -> None:
    """Qwen3-VL adds features of the picture between layers: what components write is not the
    stream."""
    lm, given = vlms.lm("qwen3_vl"), vlms.inputs("qwen3_vl")
    seen = capture(lm, given, "layers.0.resid_post", "layers.1.resid_pre")
    assert tiny.gap(seen["layers.0.resid_post"], seen["layers.1.resid_pre"]) > 0.01
    with pytest.raises(InputError, match="DeepStack"):
        sent(lm, lm.batch(given))
    sent(lm, lm.batch(vlms.PROMPTS[:1]))


def test_a_prefix_is_read_in_both_directions_whatever_the_batch() -> None:
    """PaliGemma without token types: Transformers' own mask depends on padding; ours is the
    processor's."""
    lm = vlms.lm("paligemma")
    assert lm.batch(vlms.PROMPTS).extra["token_type_ids"].eq(0).all()
    model = zoo.build(vlms.ALL["paligemma"])
    ids = torch.tensor(vlms.PROMPTS[:1])
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    assert tiny.gap(lm(vlms.PROMPTS)["logits"][:1, : ids.shape[1]], expected) < 1e-5


@pytest.mark.parametrize(
    ("maker", "residual"),
    [
        (zoo.TEXT["eurobert"], "sequential"),
        (vlms.ALL["cohere2_vision"], "parallel"),
        (vlms.ALL["lfm2_vl"], "sequential"),
    ],
)
def test_what_is_probed_is_found_in_half_precision_too(maker: Any, residual: str) -> None:
    """Rounding of the stream is not a multiplier."""
    assert wrap(zoo.build(maker).bfloat16()).family.towers[""].residual == residual


# --- what must not hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["", "vision"])
@pytest.mark.parametrize("name", by_night(vlms.PICTURES))
def test_a_wrong_table_of_either_tower_is_found_out(name: str, tower: str) -> None:
    lm = vlms.lm(name)
    table = lm.family.towers[tower]
    wrong = table.but(
        points={"attn.out": table.points["mlp.out"], "mlp.out": table.points["attn.out"]}
    )
    with pytest.raises(FamilyError, match=r"does not hold|is not laid out"):
        prove(
            LM(lm.model, replace(lm.family, towers={**lm.family.towers, tower: wrong})),
            vlms.inputs(name),
        )


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "paligemma", "qwen2_audio"])
def test_the_wrong_direction_of_attention_is_found_out(name: str) -> None:
    lm = vlms.lm(name)
    table = lm.family.towers[""]
    wrong = replace(lm.family, towers=lm.family.towers | {"": table.but(causal=not table.causal)})
    with pytest.raises(FamilyError, match="does not hold"):
        prove(LM(lm.model, wrong), vlms.PROMPTS)


def test_a_stream_that_is_changed_between_layers_is_found_out() -> None:
    """The table that does not know of DeepStack."""
    lm = vlms.lm("qwen3_vl")
    towers = lm.family.towers | {"": replace(lm.family.towers[""], between=None)}
    with pytest.raises(FamilyError, match="enters the next layer"):
        prove(LM(lm.model, replace(lm.family, towers=towers)), vlms.inputs("qwen3_vl"))


def test_an_unknown_part_is_named() -> None:
    vision = hf.ViTMAEConfig(**vlms.V)
    config = hf.LlavaConfig(text_config=hf.LlamaConfig(**vlms.G), vision_config=vision)
    with pytest.raises(FamilyError, match="vit_mae"):
        families.find(config)
