"""Encoders and vision encoders: proved on tiny instances, compared with plain Hugging Face, or
refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stratoscope.engine.intervene import ablate, intervene, replaced
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, SiteError
from stratoscope.models import wrap
from stratoscope.models.family import out_of
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from support import tiny
from support import zoo_encoders as zoo
from support.nightly import by_night

SINGLE = [*zoo.TEXT, *zoo.VISION]


def real(name: str) -> Any:
    return zoo.lm(name).batch(zoo.inputs(name)).mask if name in zoo.TEXT else slice(None)


def prefixes(name: str) -> list[str]:
    return ["", "vision."] if name in zoo.PAIRS else [""]


@torch.no_grad()
def reported(name: str, **more: Any) -> list[Any]:
    """What plain Hugging Face says of each tower."""
    model, given = zoo.build(zoo.ALL[name]), zoo.arguments(name)
    if more.get("output_attentions"):
        model.set_attn_implementation("eager")
    if name not in zoo.PAIRS:
        return [model(**given, **more)]
    text = model.text_model(given.pop("input_ids"), given.pop("attention_mask"), **more)
    return [text, model.vision_model(**given, **more)]


# --- what holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_night(zoo.ALL))
def test_every_invariant_holds(name: str) -> None:
    lm = zoo.lm(name)
    found = checks(lm, zoo.inputs(name))
    assert [c for c in found if not c.holds] == []
    assert len(found) >= 5 * lm.dims.layers * len(prefixes(name))


@pytest.mark.parametrize("name", by_night(zoo.ALL))
def test_the_stream_and_the_output_are_hugging_face_s(name: str) -> None:
    lm = zoo.lm(name)
    for prefix, said in zip(prefixes(name), reported(name, output_hidden_states=True)):
        seen = capture(
            lm, zoo.inputs(name), *(f"{prefix}layers.*.resid_{p}" for p in ("pre", "post"))
        )
        depth = lm.layout.dims[prefix.rstrip(".")].layers
        assert len(said.hidden_states) == depth + 1
        for layer in range(depth):
            before = seen[f"{prefix}layers.{layer}.resid_pre"][real(name)]
            assert tiny.gap(before, said.hidden_states[layer][real(name)]) <= 1e-6
            if layer:
                after = seen[f"{prefix}layers.{layer - 1}.resid_post"][real(name)]
                assert tiny.gap(after, said.hidden_states[layer][real(name)]) <= 1e-6
    model = zoo.build(zoo.ALL[name])
    with torch.no_grad():
        plain = model(**zoo.arguments(name))
    with trace(lm, *lm.sites(), stop=False):
        ours = lm(zoo.inputs(name))
    key = next(k for k, v in plain.items() if isinstance(v, torch.Tensor))
    tokens = plain[key].shape[:2] == getattr(real(name), "shape", None)
    at = real(name) if tokens else slice(None)
    assert tiny.gap(ours[key][at], plain[key][at]) < 2e-6


@pytest.mark.parametrize("name", by_night(zoo.ALL))
def test_the_pattern_is_what_eager_attention_reports(name: str) -> None:
    lm = zoo.lm(name)
    if "attn.pattern" not in lm.family.towers[""].points:
        with pytest.raises(SiteError, match=r"read attn\.z"):
            lm.sites("layers.0.attn.pattern")
        return
    for prefix, said in zip(prefixes(name), reported(name, output_attentions=True)):
        site = f"{prefix}layers.*.attn.pattern"
        pattern, expected = (
            capture(lm, zoo.inputs(name), site).stack(site),
            torch.stack(said.attentions),
        )
        if name in zoo.TEXT:
            hidden = ~real(name)[None, :, None, :, None].expand_as(expected)
            pattern, expected = pattern.masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0)
        assert tiny.gap(pattern, expected) <= 1e-6


@pytest.mark.parametrize("name", by_night(zoo.TEXT))
def test_padded_equals_single(name: str) -> None:
    lm, site = zoo.lm(name), f"layers.{zoo.lm(name).dims.layers - 1}.resid_post"
    together = capture(lm, zoo.inputs(name), site)[site]
    for row, prompt in enumerate(zoo.inputs(name)):
        alone = capture(lm, [prompt], site)[site][0]
        assert tiny.gap(together[row, : len(prompt)], alone) < 2e-6


@pytest.mark.parametrize("name", by_night(SINGLE))
def test_sweep_equals_naive(name: str) -> None:
    lm = zoo.lm(name)
    value = torch.randn(1, 1, lm.dims.dim, generator=torch.Generator().manual_seed(2))
    cells = [
        replaced("layers.1.resid_pre", value, positions=[1]),
        ablate("layers.2.attn.z", units=[1]),
        ablate("layers.0.mlp.out", positions=[0]),
        [ablate("layers.0.attn.out", positions=[2]), ablate("layers.1.mlp.act", units=[3, 7])],
    ]
    if "resid_mid" not in lm.family.towers[""].lacks:
        cells.append(replaced("layers.1.resid_mid", value, positions=[0]))

    def metric(logits: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
        # one value: a reward
        return logits[:, 0] - logits[:, -1] if logits.shape[1] > 1 else logits[:, 0]

    given = zoo.inputs(name)
    # two heads that are averaged, a mean of some patches: no metric, and no residuals
    if lm.readout.kind == "unknown":
        with pytest.raises(SiteError, match="could not be rebuilt"):
            sweep(lm, given, cells, metric)
        return
    slow = naive(lm, given, cells, metric)
    assert tiny.gap(sweep(lm, given, cells, metric), slow) < 1e-5
    assert len(torch.unique(slow[:, 0])) == len(cells)  # each cell says something else


@pytest.mark.parametrize("name", ["beit", "internvl alone", "dinov2", "dinov3_vit"])
def test_layer_scale_what_is_written_is_what_is_added(name: str) -> None:
    """By hand: the head's own product, the scale after it; and edits go through the scale
    backwards."""
    lm, given = zoo.lm(name), zoo.inputs(name)
    layer = lm.layout.layers[""][1]
    scale = getattr(layer, "lambda_2", None)
    scale = layer.layer_scale2.lambda1 if scale is None else scale
    with torch.no_grad():
        scale.copy_(torch.linspace(0.5, 2.0, len(scale)))
    seen = capture(lm, given, "layers.1.mlp.act", "layers.1.mlp.out", "layers.1.resid_mid")
    wide = lm.layout.writers(lm.layout.resolve_one("layers.1.mlp.out"))[0]
    by_hand = (seen["layers.1.mlp.act"] @ wide.weight.T + wide.bias) * scale
    assert tiny.gap(seen["layers.1.mlp.out"], by_hand) < 1e-6
    wanted = torch.randn(1, 1, lm.dims.dim)
    with intervene(lm, replaced("layers.1.mlp.out", wanted)):
        after = capture(lm, given, "layers.2.resid_pre")["layers.2.resid_pre"]
    assert tiny.gap(after, seen["layers.1.resid_mid"] + wanted) < 1e-6
    with intervene(lm, replaced("layers.1.resid_mid", wanted)):
        after = capture(lm, given, "layers.1.resid_mid", "layers.1.mlp.out", "layers.2.resid_pre")
    total = after["layers.1.resid_mid"] + after["layers.1.mlp.out"]
    assert tiny.gap(after["layers.1.resid_mid"], wanted.expand_as(total)) < 1e-6
    assert tiny.gap(after["layers.2.resid_pre"], total) < 1e-6


def test_a_scale_of_zero_cannot_be_undone() -> None:
    lm = wrap(zoo.build(zoo.ALL["beit"]))
    with torch.no_grad():
        lm.layout.layers[""][0].lambda_1[3] = 0.0
    capture(lm, zoo.inputs("beit"), "layers.0.attn.out")
    with (
        intervene(lm, ablate("layers.0.attn.out")),
        pytest.raises(SiteError, match="cannot be edited"),
    ):
        lm(zoo.inputs("beit"))


# --- what must not hold ---------------------------------------------------------------------------


def spoilt(lm: LM, fault: str) -> LM:
    """The same model under a wrong table."""
    towers = {}
    for name, tower in lm.family.towers.items():
        points = tower.points
        if fault == "writes swapped":
            other = {"attn.out": points["mlp.out"], "mlp.out": points["attn.out"]}
            towers[name] = tower.but(points=other)
        elif fault == "direction of attention":
            towers[name] = tower.but(causal=not tower.causal)
        elif fault == "activation before the function":
            towers[name] = tower.but(points={"mlp.act": points["mlp.pre"]})
        elif fault == "another residual":
            kind = "sequential" if tower.residual == "post-norm" else "post-norm"
            norms = None if kind == "sequential" else (points["mlp.pre"].path,) * 2
            towers[name] = tower.but(residual=kind, norms=norms)
    return LM(lm.model, replace(lm.family, towers=towers))


@pytest.mark.parametrize(
    "fault", ["writes swapped", "activation before the function", "another residual"]
)
@pytest.mark.parametrize("name", by_night(zoo.ALL))
def test_a_wrong_table_is_found_out(name: str, fault: str) -> None:
    lm = zoo.lm(name)
    if fault == "another residual" and lm.family.towers[""].residual != "post-norm":
        pytest.skip("a stream that is a sum has no norms to name")
    with pytest.raises(FamilyError, match="does not hold"):
        prove(spoilt(lm, fault), zoo.inputs(name))


@pytest.mark.parametrize("name", by_night([*zoo.TEXT, *zoo.PAIRS]))
def test_the_wrong_direction_of_attention_is_found_out(name: str) -> None:
    with pytest.raises(FamilyError, match="does not hold"):
        prove(spoilt(zoo.lm(name), "direction of attention"), zoo.inputs(name))


@pytest.mark.parametrize("name", ["beit", "dinov2", "dinov3_vit", "internvl alone"])
def test_a_scale_left_out_is_found_out(name: str) -> None:
    lm = zoo.lm(name)
    tower = lm.family.towers[""]
    bare = tower.but(points={"attn.out": out_of("attention"), "mlp.out": out_of("mlp")})
    bare = bare.but(attn_write=tower.attn_write[:1], mlp_write=tower.mlp_write[:1])
    with pytest.raises(FamilyError, match="does not hold"):
        prove(LM(lm.model, replace(lm.family, towers={"": bare})), zoo.inputs(name))


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(name: str) -> None:
    maker, reason = zoo.REFUSED[name]
    with pytest.raises(FamilyError) as caught:
        wrap(zoo.build(maker))
    assert reason in str(caught.value)
    assert "refused" in str(caught.value)
