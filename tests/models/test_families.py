"""Every family on a tiny random model: proved, and compared with what plain Hugging Face says of
itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError
from stratoscope.models import attention, families, wrap
from stratoscope.models import prove as proving
from stratoscope.models.attention import configs_of
from stratoscope.models.family import Family, into, out_of
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from support import tiny

TEXT = [n for n in tiny.CONFIGS if n not in ("vit", "clip", "siglip")]
TOLERANCE = 1e-4


def failed(lm: LM, name: str) -> list[str]:
    return [
        f"{c.name} at {c.place}: {c.absolute:.1e} {c.relative:.1e}"
        for c in checks(lm, tiny.inputs(name))
        if not c.holds
    ]


def real(name: str) -> torch.Tensor:
    return tiny.lm(name).batch(tiny.inputs(name)).mask


# --- what holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_invariant_holds(name: str) -> None:
    lm = tiny.lm(name)
    found = checks(lm, tiny.inputs(name))
    assert [c for c in found if not c.holds] == []
    assert len(found) >= 4 * lm.dims.layers
    assert {"the output equals Hugging Face's"} < {c.name for c in found}


@pytest.mark.parametrize("name", [n for n in TEXT if n not in tiny.VLMS])
def test_every_invariant_holds_without_padding(name: str) -> None:
    """Transformers may then skip the mask and rely on the kernel to be causal."""
    assert [c for c in checks(tiny.lm(name), [[3, 14, 15, 92, 65, 35]]) if not c.holds] == []
    assert [c for c in checks(tiny.lm(name), [[7]]) if not c.holds] == []


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_site_is_reached_with_its_axes(name: str) -> None:
    lm = tiny.lm(name)
    with trace(lm, *lm.sites(), stop=False) as seen:
        lm(tiny.inputs(name))
    for site in lm.sites():
        value, dims = seen[site], lm.layout.dims[site.tower]
        sizes = {
            "dim": dims.dim,
            "head": dims.heads,
            "kv_head": dims.kv_heads,
            "head_dim": dims.head_dim,
        }
        sizes["neuron"] = dims.neurons
        assert value.ndim == len(site.axes)
        for axis, word in enumerate(site.axes):
            if word in sizes and site.point != "projector":
                assert value.shape[axis] == sizes[word], (site, word)
        assert float(value[torch.isfinite(value)].abs().max()) > 0


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_half_precision_holds_too(name: str) -> None:
    lm = wrap(tiny.model(name).to(torch.bfloat16))
    given = lm.batch(tiny.inputs(name))
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.extra.items()}
    assert [c for c in checks(lm, replace(given, extra=halved)) if not c.holds] == []


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_output_is_hugging_face_s_with_and_without_the_seam(name: str) -> None:
    plain, lm = tiny.model(name), tiny.lm(name)
    with torch.no_grad():
        expected = plain(**tiny.arguments(name))
    key = next(k for k, v in expected.items() if isinstance(v, torch.Tensor))
    expected = expected[key]
    with torch.no_grad():
        got = lm(tiny.inputs(name))[key]
    every = [s for s in lm.sites() if s.seam] or lm.sites()
    with trace(lm, *every, stop=False):
        seamed = lm(tiny.inputs(name))[key]
    if name in TEXT:
        expected, got, seamed = (x[real(name)] for x in (expected, got, seamed))
    assert tiny.gap(got, expected) == 0
    assert tiny.gap(seamed, expected) < TOLERANCE


# --- Hugging Face as an independent witness -------------------------------------------------------


def states(name: str) -> dict[str, list[torch.Tensor]]:
    """Hidden states that Hugging Face reports, by tower: what enters each layer (the last one may
    be normed)."""
    model, given = tiny.model(name), tiny.arguments(name)
    with torch.no_grad():
        if name in ("clip", "siglip"):
            text = model.text_model(given["input_ids"], output_hidden_states=True)
            image = model.vision_model(given["pixel_values"], output_hidden_states=True)
            return {"": text.hidden_states, "vision": image.hidden_states}
        return {"": model(**given, output_hidden_states=True).hidden_states}


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_residual_stream_is_what_hugging_face_reports(name: str) -> None:
    lm = tiny.lm(name)
    for tower, reported in states(name).items():
        prefix = f"{tower}." if tower else ""
        points = ("resid_pre", "resid_post")
        seen = capture(lm, tiny.inputs(name), *(f"{prefix}layers.*.{p}" for p in points))
        depth = lm.layout.dims[tower].layers
        assert len(reported) == depth + 1
        mask = real(name) if name in TEXT else slice(None)
        for layer in range(depth):
            before, after = (seen[f"{prefix}layers.{layer}.{p}"][mask] for p in points)
            assert tiny.gap(before, reported[layer][mask]) == 0
            if layer < depth - 1:
                assert tiny.gap(after, reported[layer + 1][mask]) == 0
            else:
                norm = lm.layout.final_norm
                normed = after if norm is None or tower else norm(after)
                assert min(tiny.gap(x, reported[-1][mask]) for x in (after, normed)) < 1e-6


@pytest.mark.parametrize("name", [n for n in tiny.CONFIGS if n != "bloom"])
def test_the_pattern_is_what_eager_attention_reports(name: str) -> None:
    model = tiny.model(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        if name in ("clip", "siglip"):
            reported = model.text_model(
                tiny.arguments(name)["input_ids"], output_attentions=True
            ).attentions
        else:
            reported = model(**tiny.arguments(name), output_attentions=True).attentions
    lm = tiny.lm(name)
    pattern = capture(lm, tiny.inputs(name), "layers.*.attn.pattern").stack("layers.*.attn.pattern")
    expected = torch.stack(list(reported))
    if name in TEXT:
        # a padded query attends to nothing
        hidden = ~real(name)[None, :, None, :, None].expand_as(expected)
        expected = expected.masked_fill(hidden, 0.0)
        pattern = pattern.masked_fill(hidden, 0.0)
        reach = real(name)[None, :, None, :].expand(pattern.shape[:-1])
        assert torch.allclose(pattern.sum(dim=-1)[reach], torch.ones(1), atol=1e-5)
    assert tiny.gap(pattern, expected) < TOLERANCE


def test_q_and_k_are_after_the_rotary_embedding() -> None:
    """By hand, from the llama paper's formula."""
    lm = tiny.lm("llama")
    config = lm.model.config
    seen = capture(
        lm,
        tiny.inputs("llama"),
        "layers.1.resid_pre",
        "layers.1.attn.q",
        "layers.1.attn.k",
        "layers.1.attn.v",
    )
    layer = lm.model.model.layers[1]
    x = seen["layers.1.resid_pre"]
    x = (
        x
        * x.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).rsqrt()
        * layer.input_layernorm.weight
    )
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    for point, heads in (("q", 4), ("k", 2), ("v", 2)):
        plain = (x @ getattr(layer.self_attn, f"{point}_proj").weight.T).unflatten(-1, (heads, 8))
        halves = torch.complex(plain[..., :4], plain[..., 4:]) * turn
        expected = plain if point == "v" else torch.cat([halves.real, halves.imag], dim=-1)
        assert tiny.gap(seen[f"layers.1.attn.{point}"], expected) < 1e-5


@pytest.mark.parametrize("name", TEXT)
def test_causal_is_said_of_models_that_are(name: str) -> None:
    model, given = tiny.model(name), tiny.arguments(name)
    other = dict(given, input_ids=given["input_ids"].clone())
    other["input_ids"][0, -1] = 60
    with torch.no_grad():
        one, two = (
            next(v for v in model(**x).values() if isinstance(v, torch.Tensor))[0, :-1]
            for x in (given, other)
        )
    assert (tiny.gap(one, two) < 1e-5) == tiny.lm(name).family.towers[""].causal


@pytest.mark.parametrize("name", tiny.VLMS)
def test_image_positions(name: str) -> None:
    batch = tiny.lm(name).batch(tiny.inputs(name))
    assert torch.equal(batch.image, batch.ids == tiny.IMAGE)
    assert int(batch.image.sum()) == (16 if name == "qwen2_5_vl" else 4)
    assert int(tiny.lm(name).batch([[1, 2, 3]]).image.sum()) == 0
    assert tiny.lm("llama").batch([[1, tiny.IMAGE]]).image is None


@pytest.mark.parametrize("name", tiny.VLMS)
def test_the_projector_is_what_stands_at_image_positions(name: str) -> None:
    lm = tiny.lm(name)
    seen = capture(lm, tiny.inputs(name), "projector", "layers.0.resid_pre")
    batch = lm.batch(tiny.inputs(name))
    at_images = seen["layers.0.resid_pre"][batch.image]
    projected = seen["projector"].flatten(0, 1)
    # the tower attends by windows, and the rows are put back in order after the merger
    if name == "qwen2_5_vl":
        at_images, projected = (x[x[:, 0].argsort()] for x in (at_images, projected))
    assert tiny.gap(projected, at_images) < 1e-6


# --- what must not hold ---------------------------------------------------------------------------


def changed(family: Family, **points: Any) -> Family:
    return replace(family, towers={**family.towers, "": family.towers[""].but(points=points)})


def tower(family: Family, **fields: Any) -> Family:
    return replace(family, towers={**family.towers, "": family.towers[""].but(**fields)})


PLANTED: dict[str, tuple[str, Any]] = {
    "attn.out and mlp.out swapped": (
        "llama",
        lambda f: changed(f, **{"attn.out": out_of("mlp"), "mlp.out": out_of("self_attn")}),
    ),
    "z read at the input of q": (
        "llama",
        lambda f: changed(f, **{"attn.z": into("self_attn.q_proj")}),
    ),
    "act read before the gate": (
        "llama",
        lambda f: changed(f, **{"mlp.act": out_of("mlp.gate_proj")}),
    ),
    "pre is the ungated half": (
        "llama",
        lambda f: changed(f, **{"mlp.pre": out_of("mlp.up_proj")}),
    ),
    "wrong half of a fused gate": (
        "phi3",
        lambda f: changed(f, **{"mlp.pre": out_of("mlp.gate_up_proj", part=(1, 2))}),
    ),
    "wrong half of a fused gate ": (
        "modernbert",
        lambda f: changed(f, **{"mlp.pre": out_of("mlp.Wi", part=(1, 2))}),
    ),
    "post-norm of attention left out": (
        "gemma2",
        lambda f: changed(f, **{"attn.out": out_of("self_attn")}),
    ),
    "post-norm of mlp left out": ("olmo2", lambda f: changed(f, **{"mlp.out": out_of("mlp")})),
    "post-norm left out of the write": (
        "gemma2",
        lambda f: tower(f, attn_write=("self_attn.o_proj",)),
    ),
    "resid_post is the attention's": (
        "llama",
        lambda f: changed(f, resid_post=out_of("self_attn")),
    ),
    "final norm left out": ("llama", lambda f: tower(f, final_norm=None)),
    "another norm as final norm": ("gpt2", lambda f: tower(f, final_norm="h.0.ln_1")),
    "parallel called sequential": ("gpt_neox", lambda f: tower(f, residual="sequential")),
    "sequential called parallel": ("gpt_neox_sequential", lambda f: tower(f, residual="parallel")),
    "encoder called causal": ("modernbert", lambda f: tower(f, causal=True)),
    "decoder called bidirectional": ("llama", lambda f: tower(f, causal=False)),
    "post-norm called pre-norm": ("bert", lambda f: tower(f, residual="sequential")),
    "norms swapped": (
        "bert",
        lambda f: tower(f, norms=("output.LayerNorm", "attention.output.LayerNorm")),
    ),
    "mid read before its norm": (
        "bert",
        lambda f: changed(f, resid_mid=out_of("attention.output.dense")),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_table_is_found_out(fault: str) -> None:
    name, spoil = PLANTED[fault]
    lm = tiny.lm(name)
    assert failed(lm, name) == []
    wrong = LM(lm.model, spoil(lm.family))
    with pytest.raises(FamilyError, match="does not hold"):
        prove(wrong, tiny.inputs(name))


def test_a_wrong_order_of_query_heads_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query head h reads key/value head h // groups, not h % heads."""
    wrong = lambda x, groups: x.repeat(1, groups, 1, 1)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(proving, "repeat_heads", wrong)
        assert any("pattern @ v" in f for f in failed(tiny.lm("llama"), "llama"))
    with monkeypatch.context() as patch:
        patch.setattr(proving, "repeat_heads", wrong)
        patch.setattr(attention, "repeat_heads", wrong)
        bad = failed(tiny.lm("llama"), "llama")
        assert any("the output equals" in f for f in bad)


@pytest.mark.parametrize(
    ("name", "fault"), [("gemma2", "no soft-cap"), ("qwen2", "scale"), ("bert_base", "scale")]
)
def test_wrong_attention_arithmetic_is_found_out(
    name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bert_base has no read-out: its last hidden state must tell."""
    right = attention.scores_of
    wrong = {
        "no soft-cap": lambda q, k, scaling, cap: right(q, k, scaling, None),
        "scale": lambda q, k, scaling, cap: right(q, k, 1.1 * scaling, cap),
    }[fault]
    monkeypatch.setattr(attention, "scores_of", wrong)
    assert any("the output equals" in f for f in failed(tiny.lm(name), name))


def test_a_site_that_is_never_reached_is_a_failure() -> None:
    lm = tiny.lm("bloom")
    points = {
        "attn.pattern": replace(
            families.find(tiny.lm("llama").model.config).towers[""].points["attn.pattern"],
            path="self_attention",
        )
    }
    bloom = replace(
        lm.family.towers[""], points={**lm.family.towers[""].points, **points}, lacks={}
    )
    wrong = LM(lm.model, replace(lm.family, towers={"": bloom}))
    assert any("the site is reached" in f and "attn.pattern" in f for f in failed(wrong, "bloom"))


def test_proving_leaves_the_configs_alone() -> None:
    lm = tiny.lm("llava")
    before = [(c._attn_implementation_internal, c.to_dict()) for c in configs_of(lm.model)]
    prove(lm, tiny.inputs("llava"))
    assert [(c._attn_implementation_internal, c.to_dict()) for c in configs_of(lm.model)] == before
