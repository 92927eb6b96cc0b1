"""Each intervention against a hook written by hand on the plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jaxtyping
import pytest
import torch
from torch import Tensor

from stratoscope.engine.intervene import (
    Intervention,
    ablate,
    add,
    clamped,
    intervene,
    knock_out,
    largest,
    permuted,
    project_out,
    replaced,
    scaled,
)
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.sites import parse
from support import tiny

PROMPTS = tiny.inputs("llama")
LAST = [8, 4]
REAL = torch.arange(9) < torch.tensor([[9], [5]])
TOLERANCE = 1e-5
VALUE = torch.linspace(-1, 1, 32)
ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(4))
AXES = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(3)))[0].T


@torch.no_grad()
def ours(name: str, *changes: Intervention) -> Tensor:
    lm = tiny.lm(name)
    with intervene(lm, *changes):
        return lm(PROMPTS)["logits"][REAL]


@torch.no_grad()
def by_hand(
    name: str,
    path: str,
    change: Callable[[Tensor], Tensor],
    *,
    before: bool = False,
    layer: int = 1,
) -> Tensor:
    """The logits of the plain model with `change` made, out of place, to what enters or leaves a
    module of a layer."""
    model = tiny.model(name)
    stack = {
        "llama": "model.layers",
        "gpt2": "transformer.h",
        "gpt_neox": "gpt_neox.layers",
        "bert": "bert.encoder.layer",
    }
    module = model.get_submodule(f"{stack[name]}.{layer}").get_submodule(path)
    if before:
        module.register_forward_pre_hook(lambda m, args: (change(args[0].clone()), *args[1:]))
    else:
        module.register_forward_hook(
            lambda m, args, out: (
                (change(out[0].clone()), *out[1:])
                if isinstance(out, tuple)
                else change(out.clone())
            )
        )
    return model(**tiny.arguments("llama")).logits[REAL]


def at(
    positions: list[int] | None, operation: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The operation at one position of each example, or everywhere."""

    def change(x: Tensor) -> Tensor:
        if positions is None:
            return operation(x)
        for example, position in enumerate(positions):
            x[example, position] = operation(x[example, position])
        return x

    return change


OPERATIONS: dict[str, tuple[Callable[..., Intervention], Callable[[Tensor], Tensor]]] = {
    "replace": (lambda site, **w: replaced(site, VALUE, **w), lambda x: VALUE.expand_as(x)),
    "add": (lambda site, **w: add(site, VALUE, scale=3.0, **w), lambda x: x + 3 * VALUE),
    "scale": (lambda site, **w: scaled(site, -0.5, **w), lambda x: -0.5 * x),
    "clamp": (lambda site, **w: clamped(site, -0.2, 0.3, **w), lambda x: x.clamp(-0.2, 0.3)),
    "clamp above": (lambda site, **w: clamped(site, high=0.1, **w), lambda x: x.clamp(max=0.1)),
    "project_out": (
        lambda site, **w: project_out(site, torch.tensor([[2.0, 1.0], [0.5, -3.0]]) @ AXES, **w),
        lambda x: x - (x @ AXES.T) @ AXES,
    ),
    "zero": (lambda site, **w: ablate(site, **w), torch.zeros_like),
    "largest": (
        lambda site, **w: largest(site, 9, **w),
        lambda x: torch.where(x.abs() >= x.abs().sort(dim=-1).values[..., -9:-8], x, 0.0),
    ),
    "permute": (lambda site, **w: permuted(site, ORDER, **w), lambda x: x[..., ORDER]),
}
PLACES = {
    "everywhere": (None, None),
    "last": (-1, LAST),
    "third": (2, [2, 2]),
    "one each": ([[7], [1]], [7, 1]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_every_operation_on_the_stream(name: str, operation: str, place: str) -> None:
    make, hand = OPERATIONS[operation]
    positions, places = PLACES[place]
    got = ours(name, make("layers.1.resid_pre", positions=positions))
    assert tiny.gap(got, by_hand(name, "", at(places, hand), before=True)) < TOLERANCE
    assert tiny.gap(got, ours(name)) > 1e-3
    got = ours(name, make("layers.1.resid_post", positions=positions))
    assert tiny.gap(got, by_hand(name, "", at(places, hand))) < TOLERANCE


PATHS = {
    "llama": ("self_attn.o_proj", "self_attn", "mlp.gate_proj", "mlp.down_proj", "mlp"),
    "gpt2": ("attn.c_proj", "attn", "mlp.c_fc", "mlp.c_proj", "mlp"),
    "gpt_neox": ("attention.dense", "attention", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp"),
    "bert": (
        "attention.output.dense",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "output.dense",
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_units_inside_the_layer(name: str) -> None:
    """Heads in z, neurons in pre and act, dimensions in what is written; at a named position of one
    example."""
    lm = tiny.lm(name)
    width = lm.dims.head_dim
    z, attention, pre, act, mlp = PATHS[name]

    def cut(x: Tensor) -> Tensor:
        x[1, 4, width : 2 * width] = 0.7
        x[1, 4, 3 * width :] = 0.7
        return x

    got = ours(name, replaced("layers.1.attn.z", 0.7, units=[1, -1], examples=[1], positions=-1))
    assert tiny.gap(got, by_hand(name, z, cut, before=True)) < TOLERANCE

    def neurons(x: Tensor) -> Tensor:
        x[..., [5, 40]] = x[..., [5, 40]] * 3
        return x

    assert (
        tiny.gap(
            ours(name, scaled("layers.1.mlp.pre", 3.0, units=[5, 40])), by_hand(name, pre, neurons)
        )
        < TOLERANCE
    )
    got = ours(name, scaled("layers.1.mlp.act", 3.0, units=[5, 40]))
    assert tiny.gap(got, by_hand(name, act, neurons, before=True)) < TOLERANCE

    def dims(x: Tensor) -> Tensor:
        x[:, 2, [0, 9]] = torch.tensor([2.0, -1.0])
        return x

    for point, path in (("attn.out", attention), ("mlp.out", mlp)):
        got = ours(
            name,
            replaced(f"layers.1.{point}", torch.tensor([2.0, -1.0]), units=[0, 9], positions=2),
        )
        assert tiny.gap(got, by_hand(name, path, dims)) < TOLERANCE


def test_a_head_s_value_has_its_head_s_axes() -> None:
    """One vector for each example, position and head."""
    value = torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(0))

    def cut(x: Tensor) -> Tensor:
        for example, position in enumerate(LAST):
            x[example, position, 0:8], x[example, position, 16:24] = (
                value[example, 0, 0],
                value[example, 0, 1],
            )
        return x

    got = ours("llama", replaced("layers.1.attn.z", value, positions=-1, units=[0, 2]))
    assert tiny.gap(got, by_hand("llama", "self_attn.o_proj", cut, before=True)) < TOLERANCE


def test_q_and_k_and_v_by_hand() -> None:
    """v passes unturned, so its edit is one of v_proj's output; an edit of q is one of all its
    query head's scores."""

    def cut(x: Tensor) -> Tensor:
        x[:, 3, 8:16] = 0
        return x

    got = ours("llama", ablate("layers.1.attn.v", units=[1], positions=3))
    assert tiny.gap(got, by_hand("llama", "self_attn.v_proj", cut)) < TOLERANCE
    q = ours("llama", scaled("layers.1.attn.q", 2.0, units=[2]))
    k = ours("llama", scaled("layers.1.attn.k", 2.0))
    assert tiny.gap(q, ours("llama", scaled("layers.1.attn.scores", 2.0, units=[2]))) < TOLERANCE
    assert tiny.gap(k, ours("llama", scaled("layers.1.attn.scores", 2.0))) < TOLERANCE
    assert tiny.gap(q, k) > 1e-3


def test_a_pattern_by_hand() -> None:
    """Every head of layer 1 attends to its first token: z is the first token's v."""
    lm = tiny.lm("llama")
    first = torch.zeros(9)
    first[0] = 1.0
    with intervene(lm, replaced("layers.1.attn.pattern", first)):
        seen = capture(lm, PROMPTS, "layers.1.attn.v", "layers.1.attn.z")
    v = seen["layers.1.attn.v"][:, :1].repeat_interleave(2, dim=2)
    assert tiny.gap(seen["layers.1.attn.z"], v.expand(2, 9, 4, 8)) < TOLERANCE


@pytest.mark.parametrize("positions", [None, -1])
def test_resid_mid_is_what_the_mlp_reads_and_what_it_is_added_to(positions: int | None) -> None:
    """Both branches by hand: the input of the MLP's norm, and the residual stream after it."""
    model = tiny.model("llama")
    layer, held = model.model.layers[1], {}
    places = None if positions is None else LAST

    def norm_input(module: Any, args: Any) -> Any:
        held["before"] = args[0]
        held["after"] = at(places, lambda x: x * 0.5 + VALUE)(args[0].clone())
        return (held["after"],)

    layer.post_attention_layernorm.register_forward_pre_hook(norm_input)
    layer.register_forward_hook(lambda m, args, out: out - held["before"] + held["after"])
    with torch.no_grad():
        expected = model(**tiny.arguments("llama")).logits[REAL]
    site = "layers.1.resid_mid"
    got = ours(
        "llama", scaled(site, 0.5, positions=positions), add(site, VALUE, positions=positions)
    )
    assert tiny.gap(got, expected) < TOLERANCE


def test_embed_final_norm_and_logits() -> None:
    model = tiny.model("llama")
    model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: at([3, 3], lambda x: x + VALUE)(out.clone())
    )
    with torch.no_grad():
        expected = model(**tiny.arguments("llama")).logits[REAL]
    assert tiny.gap(ours("llama", add("embed", VALUE, positions=3)), expected) < TOLERANCE
    plain = ours("llama")
    assert tiny.gap(ours("llama", scaled("final_norm", 2.0)), 2 * plain) < TOLERANCE
    assert tiny.gap(ours("llama", add("logits", 1.0)), plain + 1) < TOLERANCE


@pytest.mark.parametrize("site", ["vision.layers.1.resid_post", "projector"])
def test_vision_positions_are_patches(site: str) -> None:
    lm, given = tiny.lm("llava"), tiny.inputs("llava")
    plain = capture(lm, given, site)[site]
    with intervene(lm, replaced(site, 0.0, positions=-1)):
        seen = capture(lm, given, site, "layers.2.resid_post")
    assert float(seen[site][:, -1].abs().max()) == 0
    assert torch.equal(seen[site][:, :-1], plain[:, :-1])


# --- knock-out ------------------------------------------------------------------------------------


def masked_run(name: str, hide: list[tuple[int, int, int]], layers: list[int]) -> Tensor:
    """Plain Hugging Face with a mask of our own in some layers: (example, query, key) hidden."""
    model = tiny.model(name)
    model.set_attn_implementation("eager")

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        for example, query, key in hide:
            mask[example, :, query, key] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    stack = model.base_model.layers if name != "gpt2" else model.base_model.h
    for layer in layers:
        stack[layer].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        return model(**tiny.arguments("llama")).logits[REAL]


@pytest.mark.parametrize("layer", [1, "*"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_knock_out_is_a_mask_of_one_s_own(name: str, layer: int | str) -> None:
    hide = [(0, 8, 2), (0, 8, 6), (1, 4, 2), (1, 4, 6)]
    expected = masked_run(name, hide[:3], [1] if layer == 1 else [0, 1, 2])
    got = ours(name, knock_out(layer, -1, [[2, 6], [2, 2]]))
    assert tiny.gap(got, expected) < 1e-4
    assert tiny.gap(got, ours(name)) > 1e-4


def test_knock_out_of_one_head_leaves_the_others() -> None:
    lm = tiny.lm("llama")
    plain = capture(lm, PROMPTS, "layers.0.attn.pattern")["layers.0.attn.pattern"]
    with intervene(lm, knock_out(0, [4, 3], 1, heads=[2])):
        pattern = capture(lm, PROMPTS, "layers.0.attn.pattern")["layers.0.attn.pattern"]
    assert float(pattern[:, 2, 3:5, 1].abs().max()) == 0
    assert torch.allclose(pattern[:, 2, 3:5].sum(dim=-1), torch.ones(1))
    kept = plain.clone()
    kept[:, 2, 3:5] = pattern[:, 2, 3:5]
    assert torch.equal(pattern, kept)


def test_a_query_that_sees_nothing_reads_nothing() -> None:
    lm = tiny.lm("llama")
    with intervene(lm, knock_out(0, 0, 0)):
        seen = capture(lm, PROMPTS, "layers.0.attn.z", "layers.2.resid_post")
    assert float(seen["layers.0.attn.z"][:, 0].abs().max()) == 0
    assert bool(torch.isfinite(seen["layers.2.resid_post"]).all())


# --- several, and all layers ----------------------------------------------------------------------


def test_all_layers() -> None:
    every = [scaled(f"layers.{n}.mlp.out", 0.3, positions=-1) for n in range(3)]
    assert torch.equal(
        ours("llama", scaled("layers.*.mlp.out", 0.3, positions=-1)), ours("llama", *every)
    )


def test_order_is_outer_first_then_as_listed() -> None:
    lm, site = tiny.lm("llama"), "layers.1.resid_post"
    plain = capture(lm, PROMPTS, site)[site]
    with intervene(lm, add(site, 1.0)), intervene(lm, scaled(site, 2.0), add(site, 5.0)):
        assert tiny.gap(capture(lm, PROMPTS, site)[site], (plain + 1) * 2 + 5) < 1e-6
    with intervene(lm, scaled(site, 2.0), add(site, 5.0)), intervene(lm, add(site, 1.0)):
        assert tiny.gap(capture(lm, PROMPTS, site)[site], plain * 2 + 6) < 1e-6
    assert torch.equal(capture(lm, PROMPTS, site)[site], plain)


def test_leaving_the_block_undoes_it() -> None:
    plain = ours("llama")
    assert not torch.equal(ours("llama", scaled("layers.*.attn.out", 0.0)), plain)
    assert torch.equal(ours("llama"), plain)


def test_ablations_take_their_values_from_a_reference() -> None:
    lm, site = tiny.lm("llama"), "layers.1.mlp.out"
    seen = capture(lm, PROMPTS, site)
    mean = torch.cat([seen[site][0], seen[site][1, :5]]).mean(dim=0)
    assert (
        tiny.gap(
            ours("llama", ablate(site, "mean", reference=seen.mean(site))),
            ours("llama", replaced(site, mean)),
        )
        < 1e-6
    )
    swapped = ablate(site, "resample", reference=seen[site])
    assert torch.equal(swapped.value[1], seen[site][0])
    # its padding stands nowhere
    assert torch.equal(swapped.value[0], seen[site][1, :5][torch.arange(9) % 5])
    three = torch.arange(3.0)[:, None, None].expand(3, 1, 32)
    for seed in range(8):
        rolled = ablate(site, "resample", reference=three, seed=seed).value[:, 0, 0].tolist()
        assert sorted(rolled) == [0, 1, 2]
        assert all(a != b for a, b in enumerate(rolled))
        assert torch.equal(
            ablate(site, "resample", reference=three, seed=seed).value[:, 0, 0],
            torch.tensor(rolled),
        )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ablate("layers.1.mlp.out", "mean"), "needs `reference=`"),
        (
            lambda: ablate("layers.1.mlp.out", "resample", reference=torch.zeros(1, 9, 32)),
            "at least two",
        ),
        (lambda: clamped("layers.1.mlp.out", 2.0, 1.0), "low 2.0 is above high 1.0"),
        (lambda: scaled("layers.1.mlp.out", 2.0, keys=[1]), "`keys` cannot narrow"),
        (lambda: scaled("layers.1.attn.scores", 2.0, positions=9), "outside example 0"),
        (lambda: scaled("layers.1.mlp.act", 2.0, units=[48]), "this site has 48, numbered 0 to 47"),
        (lambda: scaled("layers.1.attn.v", 2.0, units=[2]), "kv_head .* this site has 2"),
        (lambda: scaled("layers.1.mlp.act", 2.0, units=[]), "this site has 48"),
        (lambda: scaled("layers.1.mlp.act", 2.0, examples=[2]), "this batch has 2"),
        (lambda: scaled("layers.1.mlp.act", 2.0, examples=[-1]), "numbered from 0"),
        (
            lambda: replaced("layers.1.mlp.out", torch.zeros(31)),
            r"shape \(31,\) does not fit .* \(2, 9, 32\)",
        ),
        (
            lambda: add("layers.1.mlp.out", torch.zeros(2, 32), positions=-1),
            "a single position keeps its axis",
        ),
        (lambda: add("layers.1.mlp.out", torch.zeros(4, 9, 32)), "does not fit"),
        (lambda: scaled("layers.1.mlp.out", torch.zeros(1, 1, 1, 1)), "does not fit"),
        (lambda: largest("layers.1.mlp.act", -1), "keep 0 or more"),
        (lambda: permuted("layers.1.mlp.out", torch.zeros(32).long()), "is no permutation"),
        (lambda: permuted("layers.1.mlp.out", torch.zeros(1).long()), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Intervention], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ours("llama", make())


def test_sites_that_are_not_there_or_cannot_be_changed() -> None:
    with pytest.raises(SiteError, match="parallel"):
        ours("gpt_neox", scaled("layers.1.resid_mid", 2.0))
    with pytest.raises(SiteError, match="can be read but not changed"):
        ours("mixtral", scaled("layers.1.mlp.router", 2.0))
    with pytest.raises(SiteError, match="not a site name"):
        scaled("layers.1.mlp.oot", 2.0)


def test_half_precision_stays_half() -> None:
    from stratoscope.models import wrap

    lm = wrap(tiny.model("llama").bfloat16())
    changes = [
        add("layers.0.resid_mid", VALUE),
        scaled("layers.1.attn.z", torch.tensor(2.0), positions=-1, units=[1]),
    ]
    changes += [
        project_out("layers.1.resid_post", AXES),
        replaced("layers.2.attn.pattern", 0.1, positions=0),
    ]
    with torch.no_grad(), intervene(lm, *changes):
        assert lm(PROMPTS)["logits"].dtype == torch.bfloat16


# --- directions and padding -----------------------------------------------------------------------


@pytest.mark.parametrize("site", ["layers.1.resid_post", "layers.1.attn.z"])
def test_project_out_takes_the_span_and_nothing_else(site: str) -> None:
    """Repeated, dependent, zero and short directions: what a least-squares projection on the given
    ones takes."""
    lm, generator = tiny.lm("llama"), torch.Generator().manual_seed(0)
    plain = capture(lm, PROMPTS, site)[site]
    size = plain.shape[-1]
    one, two = torch.randn(2, size, generator=generator)
    sets = {
        "one": one,
        "twice": torch.stack([one, one]),
        "short": 1e-6 * one,
        "zero": torch.zeros(size),
        "one and zero": torch.stack([one, torch.zeros(size)]),
        "dependent": torch.stack([one, two, 0.3 * one - 2 * two]),
        "of unlike length": torch.stack([1e4 * one, 1e-4 * two]),
        "all, twice": torch.eye(size).repeat(2, 1),
    }
    for name, given in sets.items():
        rows = torch.atleast_2d(given).double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        span = (torch.linalg.pinv(rows, rtol=1e-6) @ rows).float()
        with intervene(lm, project_out(site, given)):
            got = capture(lm, PROMPTS, site)[site]
        assert float((got - (plain - plain @ span)).norm() / plain.norm()) < 1e-5, name
    with pytest.raises(InputError, match="finite"):
        project_out(site, torch.tensor([1.0, torch.nan]))


def test_no_padding_in_a_resampled_value() -> None:
    """What stands at padding of the reference changes nothing, and values that lost their lengths
    are asked for them."""
    from dataclasses import replace

    lm, site = tiny.lm("llama"), "layers.1.attn.z"
    batch = lm.batch(PROMPTS)
    results = []
    for pad in (0, 7):
        padded = replace(batch, ids=torch.where(batch.mask, batch.ids, pad))
        reference = capture(lm, padded, site)[site]
        results.append(ours("llama", ablate(site, "resample", reference=reference)))
        by_hand = ablate(site, "resample", reference=reference + 0.0, lengths=[9, 5])
        assert torch.equal(ours("llama", by_hand), results[-1])
        with pytest.raises(InputError, match="`lengths=`"):
            ablate(site, "resample", reference=reference + 0.0)
    assert torch.equal(results[0], results[1])
    patterns = capture(lm, PROMPTS, "layers.1.attn.pattern")["layers.1.attn.pattern"]
    with pytest.raises(InputError, match="one length"):
        ablate("layers.1.attn.pattern", "resample", reference=patterns)


def test_an_operation_that_does_not_exist_is_refused_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as for users, whose types nobody checks
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError) as refused:
        Intervention(parse("layers.1.mlp.out"), cast(Any, "multiply"), torch.tensor(2.0))
    assert str(refused.value) == (
        "operation 'multiply' at `layers.1.mlp.out`: choose one of replace, add, scale, clamp, "
        "project_out, largest, permute."
    )
