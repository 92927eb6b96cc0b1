"""Site names: read, printed, wild-carded, and refused with what is nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.trace import capture
from stratoscope.errors import SiteError
from stratoscope.models import wrap
from stratoscope.models.sites import GLOBAL_POINTS, POINTS, SEAM_POINTS, Site, expand, parse
from stratoscope.models.specimen import specimens
from support import tiny

DEPTHS = {"": 3, "vision": 2}
TOWERS = st.sampled_from(["", "vision", "encoder", "audio"]) | st.from_regex(
    r"[a-z][a-z0-9_]{1,8}", fullmatch=True
).filter(lambda name: name not in ("layers", "blocks", "ln_final"))
LAYERED = st.builds(
    Site,
    TOWERS,
    st.integers(-99, 99) | st.just("*"),
    st.sampled_from(list(POINTS)),
)
GLOBAL = st.builds(Site, TOWERS, st.none(), st.sampled_from(list(GLOBAL_POINTS)))


@given(LAYERED | GLOBAL)
def test_a_printed_site_is_read_back(site: Site) -> None:
    assert parse(str(site)) == site
    assert parse(site) is site


@given(
    st.text(max_size=30)
    | st.from_regex(r"(layers|blocks)\.[0-9*-]{1,3}\.[a-z._]{1,14}", fullmatch=True)
)
def test_any_text_is_a_site_or_a_site_error(text: str) -> None:
    try:
        site = parse(text)
    except SiteError as error:
        sentence = str(error)
    else:
        assert parse(str(site)) == site
        assert site.point in (*POINTS, *GLOBAL_POINTS)
        return
    assert f"`{text}` is not a site name" in sentence
    assert "layers.N.POINT" in sentence


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("blocks.3.hook_resid_pre", "layers.3.resid_pre"),
        ("blocks.3.hook_resid_mid", "layers.3.resid_mid"),
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.0.attn.hook_z", "layers.0.attn.z"),
        ("blocks.0.attn.hook_rot_q", "layers.0.attn.q"),
        ("blocks.0.attn.hook_attn_scores", "layers.0.attn.scores"),
        ("blocks.0.attn.hook_pattern", "layers.0.attn.pattern"),
        ("blocks.0.hook_attn_out", "layers.0.attn.out"),
        ("blocks.*.mlp.hook_pre", "layers.*.mlp.pre"),
        ("blocks.*.mlp.hook_post", "layers.*.mlp.act"),
        ("blocks.-1.hook_mlp_out", "layers.-1.mlp.out"),
        ("hook_embed", "embed"),
        ("ln_final.hook_normalized", "final_norm"),
    ],
)
def test_transformer_lens_names(lens: str, ours: str) -> None:
    assert str(parse(lens)) == ours


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("layers.3.attn.zz", "layers.N.attn.z"),
        ("layers.3.resid_pos", "layers.N.resid_post"),
        ("layers.3.mlp.acts", "layers.N.mlp.act"),
        ("logit", "logits"),
        ("final_nrom", "final_norm"),
        ("vision.projectr", "projector"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(SiteError) as caught:
        parse(wrong)
    assert f"`{wrong}`" in str(caught.value)
    assert f"`{near}`" in str(caught.value)


def names(pattern: object, depths: dict[str, int] = DEPTHS) -> list[str]:
    return [str(s) for s in expand(pattern, depths)]


def test_wild_cards_negative_layers_and_repetitions() -> None:
    assert names("layers.*.attn.z") == [f"layers.{n}.attn.z" for n in range(3)]
    assert names("vision.layers.*.attn.z") == ["vision.layers.0.attn.z", "vision.layers.1.attn.z"]
    assert names("layers.-1.attn.z") == ["layers.2.attn.z"]
    assert names(["layers.-1.attn.z", "layers.*.attn.z", "embed", "embed"]) == [
        "layers.2.attn.z", "layers.0.attn.z", "layers.1.attn.z", "embed",
    ]  # fmt: skip


@pytest.mark.parametrize("layer", [3, 7, -4])
def test_a_layer_out_of_range_is_refused_with_the_range(layer: int) -> None:
    with pytest.raises(
        SiteError, match=rf"layer {layer} of 3; layers run from 0 to 2 \(or -3 to -1\)"
    ):
        expand(f"layers.{layer}.attn.z", DEPTHS)
    with pytest.raises(SiteError, match=r"no vision tower"):
        expand("vision.layers.0.attn.z", {"": 3})


def test_a_tower_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(
        SiteError, match=r"no audio tower of layers.*`vision.` for its vision tower"
    ):
        expand("audio.layers.0.attn.z", DEPTHS)
    with pytest.raises(
        SiteError, match=r"no prefix \(or `decoder.`\) for the main stack, and `enc"
    ):
        expand("audio.layers.0.attn.z", {"": 3, "encoder": 2}, main="decoder")


def test_a_main_stack_may_have_a_name_of_its_own() -> None:
    depths = {"": 3, "encoder": 2}
    found = expand(
        ["decoder.layers.-1.attn.z", "layers.2.attn.z", "decoder.embed"], depths, "decoder"
    )
    assert [str(site) for site in found] == ["layers.2.attn.z", "embed"]
    assert [str(s) for s in expand("encoder.layers.*.resid_post", depths, "decoder")] == [
        "encoder.layers.0.resid_post",
        "encoder.layers.1.resid_post",
    ]


def test_a_family_names_its_towers_as_it_likes() -> None:
    """LLaVA with its vision tower under another name, and a name for its text: the same values."""
    known = tiny.lm("llava")
    towers = {"": known.family.towers[""], "eyes": known.family.towers["vision"]}
    lm = wrap(tiny.model("llava"), family=replace(known.family, towers=towers, main="words"))
    assert "pixel_values" in specimens(lm)[-1]  # so `wrap` has proved the eyes too
    ours = ("eyes.layers.1.attn.pattern", "words.layers.0.resid_mid")
    theirs = ("vision.layers.1.attn.pattern", "layers.0.resid_mid")
    seen = capture(lm, tiny.inputs("llava"), *ours)
    expected = capture(known, tiny.inputs("llava"), *theirs)
    for one, other in zip(ours, theirs):
        assert torch.equal(seen[one], expected[other])
    with pytest.raises(SiteError, match=r"no vision tower.*`eyes.` for its eyes tower"):
        lm.sites("vision.layers.0.attn.z")


def test_points_stand_in_the_order_of_computation() -> None:
    """Taps show two points of one module in this order, so that a reader of resid_mid sees an
    edited attn.out."""
    order = list(POINTS)
    chain = [
        "resid_pre",
        "attn.q",
        "attn.scores",
        "attn.pattern",
        "attn.z",
        "attn.out",
        "resid_mid",
        "mlp.pre",
        "mlp.act",
    ]
    assert [p for p in order if p in chain] == chain
    assert order[-2:] == ["mlp.out", "resid_post"]
    assert set(POINTS) > SEAM_POINTS


@pytest.mark.parametrize(
    ("model", "site", "reason"),
    [
        ("gpt_neox", "layers.0.resid_mid", "parallel"),
        ("bloom", "layers.1.attn.pattern", "ALiBi"),
        ("bloom", "layers.*.attn.q", "read attn.z"),
        ("mixtral", "layers.0.mlp.act", "mixture of experts"),
        ("llama", "layers.0.mlp.router", "no such part"),
        ("llama", "projector", "no projector"),
        ("bert_base", "logits", "no read-out"),
        ("bert", "final_norm", "no such part"),
        ("qwen2_5_vl", "vision.layers.0.attn.q", "window"),
        ("llava", "vision.logits", "beside the main one"),
        ("llava", "vision.projector", "beside the main one"),
        ("llama", "vision.embed", "no vision tower"),
        ("clip", "logits", "no read-out"),
    ],
)
def test_a_site_the_model_lacks_is_refused_with_the_reason(
    model: str, site: str, reason: str
) -> None:
    with pytest.raises(SiteError, match=reason):
        tiny.lm(model).sites(site)
    assert parse(site) not in tiny.lm(model).sites()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_all_sites_are_their_own_names(name: str) -> None:
    lm = tiny.lm(name)
    assert len(set(lm.sites())) == len(lm.sites()) > 10
    for site in lm.sites():
        assert lm.sites(str(site)) == [site]


def test_one_site_is_one_site() -> None:
    lm = tiny.lm("llama")
    assert str(lm.layout.resolve_one("layers.-1.mlp.out")) == "layers.2.mlp.out"
    with pytest.raises(SiteError, match="names 3 sites"):
        lm.layout.resolve_one("layers.*.mlp.out")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt2", "opt"])
def test_transformer_lens_names_of_another_tensor(name: str) -> None:
    """Its hook_q and hook_k stand before rotary embedding, its RMS norm's hook before the weight:
    refused there, also in an intervention; the same tensor is given where there is no such step."""
    lm = tiny.lm(name)
    for side in "qk":
        alias, own = f"blocks.1.attn.hook_{side}", f"layers.1.attn.{side}"
        assert lm.sites(f"blocks.1.attn.hook_rot_{side}") == lm.sites(own)
        if name in ("gpt2", "opt"):
            assert lm.sites(alias) == lm.sites(own)
            continue
        with pytest.raises(
            SiteError, match=f"before rotary embedding; `{own}` is after it, as .*hook_rot_{side}"
        ):
            lm.sites(alias)
        with pytest.raises(SiteError, match="before rotary"), intervene(lm, ablate(alias)):
            pass
    if name in ("llama", "gemma2"):
        with pytest.raises(SiteError, match="before its weight"):
            lm.sites("ln_final.hook_normalized")
    else:
        assert lm.sites("ln_final.hook_normalized") == lm.sites("final_norm")
