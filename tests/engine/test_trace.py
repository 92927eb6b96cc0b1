"""Traces hold what was asked, where it was asked, and end the run when they have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratoscope.engine import trace as tracing
from stratoscope.engine.intervene import add, intervene, scaled
from stratoscope.engine.memory import predicted
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError, MemoryRefusal, SiteError
from support import tiny

PROMPTS = tiny.inputs("llama")
LENGTHS = [9, 5]


class Ran:
    """How many layers of the main stack ran inside the block."""

    def __init__(self, lm: Any) -> None:
        self.layers, self.count = lm.layout.layers[""], 0

    def __enter__(self) -> Ran:
        self.hooks = [layer.register_forward_pre_hook(self.tick) for layer in self.layers]
        return self

    def tick(self, *_: object) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def test_only_what_was_asked_is_held() -> None:
    lm = tiny.lm("llama")
    with trace(lm, "layers.1.attn.z", "layers.*.mlp.out") as seen:
        lm(PROMPTS)
    assert [str(s) for s in seen.sites] == [
        "layers.1.attn.z",
        *(f"layers.{n}.mlp.out" for n in range(3)),
    ]
    with pytest.raises(SiteError, match=r"`layers\.2\.attn\.z` was not traced"):
        seen["layers.2.attn.z"]
    with pytest.raises(SiteError, match="names 3 sites"):
        seen["layers.*.mlp.out"]
    with pytest.raises(SiteError, match="was not traced"):
        seen.stack("layers.*.attn.z")
    assert torch.equal(seen.stack("layers.*.mlp.out")[2], seen["layers.-1.mlp.out"])
    assert seen.stack("layers.*.mlp.out").shape == (3, 2, 9, 32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "modernbert", "mixtral"])
def test_positions_are_an_example_s_own(name: str) -> None:
    lm = tiny.lm(name)
    sites = [
        s
        for s in lm.sites()
        if (s.tower == "" and "position" in s.axes) or s.point == "attn.pattern"
    ]
    whole = capture(lm, PROMPTS, *sites)
    for positions, own in (
        (-1, [[8], [4]]),
        (2, [[2], [2]]),
        ([0, -2], [[0, 7], [0, 3]]),
        ([[8, 1], [4, -5]], [[8, 1], [4, 0]]),
    ):
        seen = capture(lm, PROMPTS, *sites, positions=positions)
        for site in sites:
            axis = list(site.axes).index("query" if site.point == "attn.pattern" else "position")
            expected = torch.stack(
                [whole[site][e].index_select(axis - 1, torch.tensor(p)) for e, p in enumerate(own)]
            )
            if isinstance(positions, int):
                expected = expected.squeeze(axis)
            assert torch.equal(seen[site], expected), (site, positions)


def test_padding_side_does_not_matter() -> None:
    lm = tiny.lm("llama")
    left = torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]])
    given = {"input_ids": left, "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])}
    one, two = (
        capture(lm, x, "layers.2.resid_post", positions=-1)["layers.2.resid_post"]
        for x in (PROMPTS, given)
    )
    assert torch.equal(one, two)


def test_sites_of_a_vision_tower_have_positions_of_their_own() -> None:
    """-1 is the last patch, however long the text is."""
    for name in ("clip", "llava", "idefics3"):
        lm, site = tiny.lm(name), "vision.layers.1.resid_post"
        whole = capture(lm, tiny.inputs(name), site)[site]
        assert whole.shape[1] not in lm.batch(tiny.inputs(name)).lengths.tolist()
        assert torch.equal(capture(lm, tiny.inputs(name), site, positions=-1)[site], whole[:, -1])


# --- early stop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "layers"),
    [
        (["layers.0.attn.z"], 1),
        (["layers.1.resid_mid", "layers.0.mlp.out"], 2),
        (["layers.1.resid_post"], 2),
        (["embed"], 0),
    ],
)
def test_the_run_ends_with_the_last_site(sites: list[str], layers: int) -> None:
    lm = tiny.lm("llama")
    with Ran(lm) as ran, trace(lm, *sites) as seen:
        assert lm(PROMPTS) is None
        assert lm(PROMPTS) is None
    assert ran.count == 2 * layers
    assert len(seen.steps(sites[0])) == 2
    with Ran(lm) as ran, trace(lm, *sites, stop=False):
        assert lm(PROMPTS)["logits"].shape == (2, 9, 96)
    assert ran.count == 3


def test_no_trace_stops_another() -> None:
    lm = tiny.lm("llama")
    with trace(lm, "layers.2.resid_post") as outer:
        with trace(lm, "layers.0.resid_post") as inner:
            assert lm(PROMPTS) is not None
        assert lm(PROMPTS) is None
    assert len(outer.steps("layers.2.resid_post")) == 2
    assert len(inner.steps("layers.0.resid_post")) == 1


def test_a_direct_call_of_the_model_runs_to_its_end_and_starts_anew() -> None:
    lm = tiny.lm("llama")
    ids = torch.tensor(PROMPTS[:1])
    with trace(lm, "layers.0.resid_post", positions=-1) as seen, torch.no_grad():
        first = lm.model(ids).logits
        again = lm.model(ids).logits
    assert torch.equal(first, again)
    assert len(seen.steps("layers.0.resid_post")) == 2
    with intervene(lm, scaled("layers.0.resid_post", 0.0, positions=-1)), torch.no_grad():
        one, two = lm.model(ids).logits, lm.model(ids).logits
    assert torch.equal(one, two)
    assert not torch.equal(one, first)


# --- what is seen is what the model goes on with --------------------------------------------------


@pytest.mark.parametrize("order", ["edit outside", "edit inside"])
@pytest.mark.parametrize(
    "point", ["attn.q", "attn.pattern", "attn.z", "attn.out", "resid_mid", "mlp.pre", "resid_post"]
)
def test_a_trace_sees_the_edited_value_whichever_was_entered_first(point: str, order: str) -> None:
    lm, site = tiny.lm("gemma2"), f"layers.1.{point}"
    plain = capture(lm, PROMPTS, site)[site]
    watch, change = (
        trace(lm, site, "layers.2.resid_post"),
        intervene(lm, add(site, torch.tensor(0.25))),
    )
    first, second = (change, watch) if order == "edit outside" else (watch, change)
    with first as a, second as b:
        lm(PROMPTS)
    seen = a or b
    assert tiny.gap(seen[site], plain + 0.25) < 1e-6
    assert (
        tiny.gap(
            seen["layers.2.resid_post"],
            capture(lm, PROMPTS, "layers.2.resid_post")["layers.2.resid_post"],
        )
        > 1e-3
    )


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "opt", "bloom", "bert", "gpt_neox_sequential"]
)
def test_resid_mid_is_seen_after_an_edit_of_attn_out(name: str) -> None:
    """Both pass through one module in most models."""
    lm = tiny.lm(name)
    sites = [
        f"layers.1.{p}" for p in ("resid_pre", "attn.out", "resid_mid", "mlp.out", "resid_post")
    ]
    with intervene(lm, add("layers.1.attn.out", torch.arange(32.0) / 8)):
        seen = capture(lm, PROMPTS, *sites)
    pre, out, mid, mlp, post = (seen[s] for s in sites)
    if lm.family.towers[""].residual == "post-norm":
        norm = lm.layout.layer(lm.layout.resolve_one(sites[0])).get_submodule(
            lm.family.towers[""].norms[0]
        )
        with torch.no_grad():
            assert tiny.gap(norm(pre + out), mid) < 1e-5
    else:
        assert tiny.gap(pre + out, mid) < 1e-5
        assert tiny.gap(mid + mlp, post) < 1e-5


def test_values_are_copies() -> None:
    lm = tiny.lm("opt")  # adds to its residual stream in place
    seen = capture(lm, PROMPTS, *[s for s in lm.sites() if not s.seam])
    again = capture(lm, PROMPTS, "layers.1.attn.out")["layers.1.attn.out"]
    assert torch.equal(seen["layers.1.attn.out"], again)
    seen["layers.1.attn.out"].zero_()
    assert torch.equal(capture(lm, PROMPTS, "layers.1.attn.out")["layers.1.attn.out"], again)
    assert not seen["layers.1.resid_post"].requires_grad


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_flow_as_in_plain_pytorch() -> None:
    model = tiny.model("gpt2")
    held = {}
    model.transformer.h[1].register_forward_hook(
        lambda m, a, out: held.update(x=out if torch.is_tensor(out) else out[0])
    )
    ids = torch.tensor(PROMPTS[:1])
    model(ids).logits[0, -1, 5].backward(
        inputs=(weight := model.transformer.h[0].mlp.c_fc.weight,), retain_graph=True
    )
    lm = tiny.lm("gpt2")
    with trace(lm, "layers.1.resid_post", grad=True, stop=False) as seen:
        logits = lm(PROMPTS[:1])["logits"]
    mine = lm.model.transformer.h[0].mlp.c_fc.weight
    got = torch.autograd.grad(logits[0, -1, 5], (seen["layers.1.resid_post"], mine))
    again = model(ids).logits[0, -1, 5]
    [expected] = torch.autograd.grad(again, held["x"])
    assert tiny.gap(got[0], expected) < 1e-5
    assert tiny.gap(got[1], weight.grad) < 1e-5


# --- means ----------------------------------------------------------------------------------------


def test_the_mean_leaves_padding_out() -> None:
    lm = tiny.lm("llama")
    seen = capture(lm, PROMPTS, "layers.1.attn.z", "layers.1.attn.pattern")
    z = seen["layers.1.attn.z"]
    expected = torch.cat([z[0], z[1, :5]]).mean(dim=0)
    assert tiny.gap(seen.mean("layers.1.attn.z"), expected) < 1e-6
    with pytest.raises(InputError, match="mean over positions"):
        seen.mean("layers.1.attn.pattern")
    last = capture(lm, PROMPTS, "layers.1.attn.z", positions=-1)
    assert (
        tiny.gap(last.mean("layers.1.attn.z"), torch.stack([z[0, 8], z[1, 4]]).mean(dim=0)) < 1e-6
    )
    some = capture(lm, PROMPTS, "layers.1.attn.z", positions=[0, 1])
    assert tiny.gap(some.mean("layers.1.attn.z"), z[:, :2].flatten(0, 1).mean(dim=0)) < 1e-6


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        (9, "position 9 is outside example 0"),
        (5, "position 5 is outside example 1, which has 5 tokens"),
        (-6, "position -6"),
        ([[0], [1], [2]], "given for 3 examples; the batch has 2"),
        ([[0, 1], [2]], "one list of equal length"),
        (torch.tensor([1.5]), "give an integer"),
        ([], "give an integer"),
    ],
)
def test_positions_that_are_not_there(positions: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        capture(tiny.lm("llama"), PROMPTS, "layers.1.resid_post", positions=positions)


def test_other_errors_come_before_or_after_the_run_and_say_what_to_do() -> None:
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match="no site"), trace(lm):
        pass
    with Ran(lm) as ran, pytest.raises(SiteError), trace(lm, "layers.0.mlp.router"):
        lm(PROMPTS)
    assert ran.count == 0
    with trace(lm, "embed") as seen:
        pass
    with pytest.raises(SiteError, match="never reached"):
        seen["embed"]


def test_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.lm("llama")
    sites = [s for s in lm.sites() if s.point not in ("final_norm", "logits")]
    seen = capture(lm, PROMPTS, *sites)
    taken = sum(seen[s].numel() * seen[s].element_size() for s in sites)
    assert predicted(lm, sites, lm.batch(PROMPTS)) == taken
    monkeypatch.setattr(tracing, "available", lambda device: taken)
    with pytest.raises(MemoryRefusal, match=r"GiB are free: ask for fewer"):
        capture(lm, PROMPTS, *sites)
    capture(lm, PROMPTS, *sites, positions=-1)
