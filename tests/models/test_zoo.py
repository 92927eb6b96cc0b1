"""Every causal language model type of Transformers: proved and compared with plain Hugging Face, or
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
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks, prove
from stratoscope.models.sites import Site
from support import tiny, zoo
from support.nightly import by_night

# model type -> a part of the reason, which must be the true one
REFUSED = {
    # the layer adds the last attention's bias itself
    "gpt_neox_japanese": "or adds a bias before the sum",
    "doge": "multiplies the stream, `self_attn`, `mlp` by a number for each dimension",
    "dory": "calls its layers 2 times",
    "hrm_text": "calls its layers 6 times",
    "gemma3n_text": "several streams at once",
    "granitemoeshared": "`block_sparse_moe` and `shared_mlp` write side by side",
    "granitemoehybrid": "`block_sparse_moe` and `shared_mlp` write side by side",
    "longcat_flash": "`self_attn.0`, `self_attn.1` mix positions side by side",
    # the stream that goes on is the normed one
    "minimax": "does not go on with the stream that enters it",
    "jetmoe": "norms or mixes its residual stream",  # heads are chosen by a router
    "zaya": "by numbers for each dimension, or adds a bias",
    "inkling_text": "mix positions side by side",  # convolutions after attention and MLP
    "rwkv": "norms or mixes its residual stream",  # the first layer norms what enters it
    "cpmant": "under names we know",
}
ACCEPTED = [name for name in zoo.MAKERS if name not in REFUSED]
# Mamba reports no embedding: its first hidden state is what leaves layer 0
_LATE = {"mamba", "mamba2", "falcon_mamba"}
# Transformers reports these patterns before the sinks have taken their share
_UNSUNK = {"granite_swa", "granitemoe_swa"}


def where(lm: LM, point: str) -> list[int]:
    """The layers that have a point."""
    return [n for n in range(lm.dims.layers) if lm.layout.lack(Site("", n, point)) is None]


def arguments() -> dict[str, torch.Tensor]:
    return tiny.arguments("llama")


def test_every_type_is_built_or_named() -> None:
    assert sorted({*zoo.MAKERS, *zoo.NOT_BUILT}) == zoo.TYPES
    assert not {*zoo.MAKERS} & {*zoo.NOT_BUILT}
    assert len(ACCEPTED) >= 116


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_true_reason(name: str) -> None:
    model = zoo.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FamilyError) as caught:
        wrap(model)
    assert REFUSED[name] in str(caught.value)
    assert str(caught.value).endswith("refused.")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", by_night(ACCEPTED))
def test_every_invariant_holds(name: str) -> None:
    lm = zoo.lm(name)
    assert [c for c in checks(lm, zoo.prompts()) if not c.holds] == []
    assert lm.family.towers[""].causal
    every = {
        point for point in ("resid_pre", "resid_post") if len(where(lm, point)) == lm.dims.layers
    }
    assert every == {"resid_pre", "resid_post"}
    for layer in range(lm.dims.layers):  # every layer adds something, and says what it lacks
        assert any(layer in where(lm, point) for point in ("attn.out", "mix.out", "mlp.out"))


@pytest.mark.parametrize("name", by_night(ACCEPTED))
@torch.no_grad()
def test_sites_are_what_hugging_face_reports(name: str) -> None:
    lm, given = zoo.lm(name), arguments()
    real, depth = given["attention_mask"].bool(), lm.dims.layers
    plain = zoo.build(name)(**given, output_hidden_states=True, use_cache=False)
    with trace(lm, *lm.sites(), stop=False) as seen:
        logits = lm(zoo.prompts())["logits"]
    assert tiny.gap(logits[real], plain.logits[real]) < 1e-5
    read = lm.readout(seen[f"layers.{depth - 1}.resid_post"])
    assert tiny.gap(read[real], plain.logits[real]) < 1e-5
    states = plain.hidden_states or []
    late = name in _LATE
    for layer in range(min(depth, len(states) - 1)):
        site = f"layers.{layer}.{'resid_post' if late else 'resid_pre'}"
        assert tiny.gap(seen[site][real], states[layer][real]) < 1e-5
    if lm.family.towers[""].residual == "post-norm":
        return
    added = [
        seen[f"layers.{n}.{p}"] for p in ("attn.out", "mix.out", "mlp.out") for n in where(lm, p)
    ]
    total = seen["layers.0.resid_pre"] + sum(added)
    assert tiny.gap(total[real], seen[f"layers.{depth - 1}.resid_post"][real]) < 1e-5


@pytest.mark.parametrize("name", by_night(ACCEPTED))
@torch.no_grad()
def test_the_pattern_is_what_eager_attention_reports(name: str) -> None:
    lm, given = zoo.lm(name), arguments()
    layers = where(lm, "attn.pattern")
    if not layers:
        with pytest.raises(SiteError, match=r"attention interface|this layer is a|read attn\.z"):
            lm.sites("layers.0.attn.pattern")
        return
    said = zoo.build(name, attention="eager")(**given, output_attentions=True).attentions
    said = [x for x in said or () if x is not None]
    if len(said) != len(layers):
        pytest.skip("this model reports no attention of its own")
    seen = capture(lm, zoo.prompts(), *(f"layers.{n}.attn.pattern" for n in layers))
    for layer, expected in zip(layers, said):
        seen_here = seen[f"layers.{layer}.attn.pattern"]
        if name in _UNSUNK:
            assert float(seen_here.sum(-1).max()) < 1
            seen_here = seen_here / seen_here.sum(-1, keepdim=True)
        real = given["attention_mask"].bool()[:, None, :, None].expand_as(expected)
        assert tiny.gap(seen_here[real], expected[real]) < 1e-5


@pytest.mark.parametrize("name", by_night(ACCEPTED))
def test_padded_equals_single(name: str) -> None:
    lm = zoo.lm(name)
    site = f"layers.{lm.dims.layers - 1}.resid_post"
    together = capture(lm, zoo.prompts(), site)[site]
    for row, prompt in enumerate(zoo.prompts()):
        alone = capture(lm, [prompt], site)[site][0]
        assert tiny.gap(together[row, : len(prompt)], alone) < 1e-5


@pytest.mark.parametrize("name", by_night(ACCEPTED))
def test_sweep_equals_naive(name: str) -> None:
    lm = zoo.lm(name)
    value = torch.randn(1, 1, lm.dims.dim, generator=torch.Generator().manual_seed(2))
    cells: list[Any] = [
        replaced(f"layers.{n}.resid_pre", value, positions=[at]) for n in (0, 1) for at in (1, -1)
    ]
    cells += [ablate(f"layers.{n}.attn.z", units=[1]) for n in where(lm, "attn.z")]
    cells += [
        ablate(f"layers.{n}.{p}", positions=[2])
        for p in ("mlp.out", "mix.out")
        for n in where(lm, p)
    ]
    cells += [
        replaced(f"layers.{n}.resid_mid", value, positions=[0]) for n in where(lm, "resid_mid")[:1]
    ]

    def metric(logits: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
        return logits[:, 3] - logits[:, 5]

    slow = naive(lm, zoo.prompts(), cells, metric)
    assert tiny.gap(sweep(lm, zoo.prompts(), cells, metric), slow) < 1e-5
    assert len(torch.unique(slow[:, 0])) > len(cells) // 2


# --- what must not hold ---------------------------------------------------------------------------


def spoilt(name: str, fault: str) -> LM | None:
    """The same model under a wrong table, or None where the fault makes no difference."""
    lm = zoo.lm(name)
    tower = lm.family.towers[""]
    points, mixed = (
        tower.points,
        next((p for p in ("attn.out", "mix.out") if p in tower.points), None),
    )
    if fault == "writes swapped" and mixed and "mlp.out" in points:
        wrong = tower.but(points={mixed: points["mlp.out"], "mlp.out": points[mixed]})
    elif fault == "a write left out" and mixed:
        wrong = tower.but(points={mixed: points["resid_pre"]})
    elif fault == "factor left out" and any(point.scale for point in points.values()):
        wrong = tower.but(
            points={name: replace(point, scale=None) for name, point in points.items()}
        )
    elif fault == "factor left out of the write" and tower.attn_write and points["attn.out"].scale:
        wrong = tower.but(attn_write=tower.attn_write[:-1])
    elif fault == "act before the function" and "mlp.act" in points:
        wrong = tower.but(points={"mlp.act": points["mlp.pre"]})
    elif fault == "other half" and "mlp.pre" in points and points["mlp.pre"].part:
        half, of = points["mlp.pre"].part
        wrong = tower.but(points={"mlp.pre": replace(points["mlp.pre"], part=(1 - half, of))})
    elif fault == "wrong order" and "mlp.out" in points and mixed:
        wrong = tower.but(residual="sequential" if tower.residual == "parallel" else "parallel")
    elif fault == "gate denied" and tower.gated:
        wrong = tower.but(gated=False)
    elif fault == "what mixes" and name == "falcon_h1":
        wrong = tower.but(mixes=False)
    elif fault == "kinds left out" and tower.kinds:
        wrong = tower.but(kinds={})
    elif fault == "logit scale" and lm.family.logit_scale != 1.0:
        return LM(lm.model, replace(lm.family, logit_scale=1.0))
    else:
        return None
    return LM(lm.model, replace(lm.family, towers={"": wrong}))


def holds(lm: LM) -> bool:
    try:
        prove(lm, zoo.prompts())
    except (FamilyError, RuntimeError):  # a swapped site may not even have the shape
        return False
    return True


FAULTS = (
    "writes swapped", "a write left out", "factor left out", "factor left out of the write",
    "act before the function", "other half", "wrong order", "gate denied", "what mixes",
    "kinds left out", "logit scale",
)  # fmt: skip


@pytest.mark.parametrize("name", by_night(ACCEPTED))
def test_a_wrong_table_is_found_out(name: str) -> None:
    tried = 0
    for fault in FAULTS:
        try:
            wrong = spoilt(name, fault)
        except FamilyError:  # the table does not even fit the modules
            tried += 1
            continue
        if wrong is None:
            continue
        tried += 1
        assert not holds(wrong), f"{fault} passed"
    assert tried >= 1


# --- what a factor, a kind, a gate and a sink mean ------------------------------------------------


@pytest.mark.parametrize("name", ["granite", "minicpm3", "hyperclovax", "granitemoe", "falcon_h1"])
@torch.no_grad()
def test_what_is_written_is_what_is_added_after_the_multiplier(name: str) -> None:
    """By hand: an edit of attn.out or mlp.out by v moves the stream by v, and the write's modules
    include the factor."""
    lm, given = zoo.lm(name), [zoo.prompts()[0]]
    v = torch.randn(1, 1, lm.dims.dim, generator=torch.Generator().manual_seed(3))
    seen = capture(
        lm, given, "layers.1.resid_pre", "layers.0.attn.out", "layers.0.mlp.out", "layers.0.attn.z"
    )
    with intervene(lm, replaced("layers.0.mlp.out", v)):
        after = capture(lm, given, "layers.1.resid_pre")["layers.1.resid_pre"]
    assert tiny.gap(after, seen["layers.1.resid_pre"] - seen["layers.0.mlp.out"] + v) < 1e-5
    x = seen["layers.0.attn.z"].flatten(2)
    for module in lm.layout.writers(lm.layout.resolve_one("layers.0.attn.out")):
        x = module(x)
    assert tiny.gap(x, seen["layers.0.attn.out"]) < 1e-5


@pytest.mark.parametrize("name", ["granite", "cohere", "hyperclovax", "minicpm3", "falcon_h1"])
def test_the_weight_of_the_logits_holds_the_logit_scale(name: str) -> None:
    lm = zoo.lm(name)
    assert lm.family.logit_scale != 1.0
    normed = capture(lm, zoo.prompts(), "final_norm")["final_norm"]
    with torch.no_grad():
        logits = lm(zoo.prompts())["logits"]
    assert tiny.gap(normed @ lm.weight("logits").T, logits) < 1e-5


def test_a_layer_without_attention_says_so() -> None:
    lm = zoo.lm("bamba")
    assert where(lm, "attn.z") == [1]
    assert where(lm, "mix.out") == [0]
    with pytest.raises(
        SiteError,
        match=r"`layers.0.attn.z` does not exist .* this layer is a BambaMixer, not attention",
    ):
        lm.sites("layers.0.attn.z")
    with pytest.raises(SiteError, match="this layer mixes positions by attention alone"):
        lm.sites("layers.1.mix.out")
    with pytest.raises(SiteError, match="this layer is a BambaMixer"):
        lm.sites("layers.*.attn.pattern")


def test_a_mixture_of_experts_has_a_router_in_its_layers_only() -> None:
    lm = zoo.lm("qwen3_moe")
    assert where(lm, "mlp.act") == [0]
    assert where(lm, "mlp.router") == [1]
    with pytest.raises(SiteError, match="expert by expert"):
        lm.sites("layers.1.mlp.act")
    given = arguments()
    with torch.no_grad():
        said = zoo.build("qwen3_moe")(**given, output_router_logits=True).router_logits
    seen = capture(lm, zoo.prompts(), "layers.1.mlp.router")["layers.1.mlp.router"]
    assert seen.shape == (2, 9, 4)
    real = given["attention_mask"].bool()
    assert tiny.gap(seen[real], said[-1].reshape(seen.shape)[real]) < 1e-5


def test_sinks_take_their_share_of_the_pattern() -> None:
    lm = zoo.lm("gpt_oss")
    pattern = capture(lm, zoo.prompts()[:1], "layers.0.attn.pattern", "layers.0.attn.scores")
    scores, rows = pattern["layers.0.attn.scores"][0], pattern["layers.0.attn.pattern"][0]
    sinks = lm.model.model.layers[0].self_attn.sinks
    by_hand = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    assert tiny.gap(rows, by_hand) < 1e-5
    assert float(rows.sum(-1).max()) < 1


def test_edges_are_refused_behind_a_gate() -> None:
    from stratoscope.engine.wiring import wiring

    with pytest.raises(SiteError, match="a gate stands between"):
        wiring(zoo.lm("afmoe"))
    assert wiring(zoo.lm("gpt_oss")).heads == 4


def test_experts_of_one_key_head_are_counted() -> None:
    assert zoo.lm("gpt_bigcode").dims.kv_heads == 1
    assert (
        capture(zoo.lm("gpt_bigcode"), zoo.prompts(), "layers.0.attn.k")["layers.0.attn.k"].shape[2]
        == 1
    )
