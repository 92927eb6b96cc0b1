"""Feature vectors against plain weights, plain autograd, direct logit attribution and a model in
which nothing is approximate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from stratoscope.circuits import feature_vectors, path_patching
from stratoscope.engine.backwards import through_norm
from stratoscope.engine.intervene import add, intervene
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.layers import direct_logit_attribution
from stratoscope.maths.norm import FrozenNorm, freeze
from stratoscope.models import LM, wrap
from support import tiny


def _fitted(case):
    """The same for both prompts and for each alone."""
    whole = replace(case, example=None, side="right")
    observable = {whole.answer[0]: 1.0, whole.foil[0]: -1.0}
    path = (("head", 1, 2), ("mlp", 0))
    return feature_vectors.fit(case.lm, case.references, observable=observable, path=path)


EXAMPLE = {
    "measure": lambda case: {"vectors": _fitted(case), "draws": 2},
    "fit": lambda case: {
        "observable": {case.answer[0]: 1.0, case.foil[0]: -1.0},
        "path": (("head", 1, 2), ("mlp", 0)),
    },
}
PROMPT = [3, 14, 15, 92, 65, 35]
ASKED = {7: 1.0, 8: -1.0}


def linear() -> LM:
    """A llama of two layers without norms, whose MLPs write nothing: linear but for its patterns,
    two query heads to each key/value head."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**tiny.GROUPED, "num_hidden_layers": 2})
    model = hf.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.model.norm = torch.nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.Identity()
        layer.mlp.down_proj.weight.data.zero_()
    return wrap(model)


def by_hand(model, row: Tensor, layer: int, head: int, kv: int) -> Tensor:
    """W_V^T W_O^T y from the weights of a llama."""
    attention, size = model.model.layers[layer].self_attn, model.config.head_dim
    o = attention.o_proj.weight[:, head * size : (head + 1) * size]
    v = attention.v_proj.weight[kv * size : (kv + 1) * size]
    return (v.T @ o.T @ row).detach()


def test_the_gradient_of_an_rms_norm_is_the_held_vector_less_its_part_along_the_stream() -> None:
    """J^T n = (sqrt(d) / |x|) (I - x^ x^T) (g * n): cosine sqrt(1 - (x^ . u)^2)."""
    generator = torch.Generator().manual_seed(0)
    x, g, n = torch.randn(3, 48, generator=generator, dtype=torch.double)
    x = x.requires_grad_(True)
    out = g * x / x.square().mean().sqrt()
    [true] = torch.autograd.grad(out @ n, x)
    scale = 48**0.5 / x.detach().norm()
    frozen = FrozenNorm(g, torch.zeros_like(g), scale, centred=False)
    along, unit = x.detach() / x.detach().norm(), (g * n) / (g * n).norm()
    y = through_norm(frozen, n)
    assert torch.allclose(true, scale * (g * n - along * (along @ (g * n))), atol=1e-12)
    cosine = torch.cosine_similarity(y, true, dim=0)
    assert float(cosine) == pytest.approx(float((1 - (along @ unit) ** 2) ** 0.5), abs=1e-6)
    assert cosine < 0.999  # there was something to see


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_norm_is_carried_back_by_its_transpose(kind) -> None:
    torch.manual_seed(0)
    norm, x = kind(24), torch.randn(24) + 1
    norm.weight.data = torch.rand(24) + 0.5
    y, part = torch.randn(2, 24)
    with torch.no_grad():
        frozen = freeze(norm, x)
        carried = float(through_norm(frozen, y) @ part)
        assert carried == pytest.approx(float(y @ frozen.linear(part)), abs=1e-5)


def test_a_fit_says_the_cosine_of_its_first_vector() -> None:
    lm = wrap(tiny.model("llama"))
    found = feature_vectors.fit(lm, [PROMPT], observable=ASKED)
    states: list[Tensor] = []
    hook = lm.model.model.norm.register_forward_pre_hook(lambda m, a: states.append(a[0].detach()))
    with torch.no_grad():
        lm.model(torch.tensor([PROMPT]))
    hook.remove()
    x, g = states[0][0, -1].double(), lm.model.model.norm.weight.detach().double()
    u = g * (lm.model.lm_head.weight[7] - lm.model.lm_head.weight[8]).detach().double()
    along = (x / x.norm()) @ (u / u.norm())
    assert float(found.norm_cosine) == pytest.approx(float((1 - along**2) ** 0.5), abs=1e-6)
    expected = u * 32**0.5 / x.norm()
    assert torch.allclose(found.vector[0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "phi3"])
def test_without_a_path_contributions_are_direct_logit_attribution(name: str) -> None:
    lm = wrap(tiny.model(name))
    fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED)
    found = feature_vectors.measure(lm, [PROMPT], vectors=fitted, draws=2)
    direct = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8).isel(example=0)
    heads = direct.contribution[direct.kind == "head"].values.reshape(found.contribution.shape[1:])
    assert found.contribution.values[0] == pytest.approx(heads, abs=1e-5)
    assert np.abs(heads).max() > 0.01
    assert found.through.values[0].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("head", range(4))
def test_a_query_head_reads_the_values_of_its_group(head: int) -> None:
    """Query head h shares key/value head h // 2; any other one gives another vector."""
    lm = linear()
    model, row = lm.model, lm.model.lm_head.weight[7] - lm.model.lm_head.weight[8]
    fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED, path=(("head", 1, head),))
    right, wrong = (by_hand(model, row, 1, head, kv) for kv in (head // 2, 1 - head // 2))
    assert torch.allclose(fitted.vector[1], right, atol=1e-6)
    assert not torch.allclose(fitted.vector[1], wrong, atol=1e-2)


def always_there(lm: LM, layer: int, head: int) -> Tensor:
    """What the values of a head hold at any input at all: biases."""
    block, size = lm.layout.layers[""][layer], lm.dims.head_dim
    if hasattr(block, "attn"):
        bias = block.ln_1.bias @ block.attn.c_attn.weight + block.attn.c_attn.bias
        return bias[2 * lm.dims.dim :][head * size : (head + 1) * size].detach()
    bias, kv = block.self_attn.v_proj.bias, head // 2
    return torch.zeros(size) if bias is None else bias[kv * size : (kv + 1) * size].detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_head_is_carried_back_with_its_norm_held(name: str) -> None:
    """Over all keys, attention times x . y adds up to what direct attribution gives the head, less
    what its biases write."""
    lm, (layer, head) = wrap(tiny.model(name)), (2, 1)
    carried, ways = 0.0, {}
    for key in range(len(PROMPT)):
        fitted = feature_vectors.fit(
            lm, [PROMPT], observable=ASKED, path=(("head", layer, head),), at=[key]
        )
        ways[key] = fitted.vector[1]
        one = feature_vectors.measure(lm, [PROMPT], vectors=fitted, draws=1).isel(example=0)
        carried += float(one.through[key] * one.score[key])
        assert fitted.positions == [[5, key]]
    assert float(one.through.sum()) == pytest.approx(1, abs=1e-6)
    direct = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8).isel(example=0)
    whole = float(direct.contribution.sel(component=f"L{layer}H{head}"))
    bias = always_there(lm, layer, head)
    if bool(bias.any()):  # no post-norm in these
        size = lm.dims.head_dim
        o = lm.weight(f"layers.{layer}.attn.out")[:, head * size : (head + 1) * size].detach()
        whole -= float(fitted.vector[0] @ (o @ bias))
    assert carried == pytest.approx(whole, abs=1e-5)
    # the keys differ in their norm's scale alone
    assert float(torch.cosine_similarity(ways[0], ways[3], dim=0)) == pytest.approx(1, abs=1e-5)


def test_an_mlp_is_carried_back_by_its_true_gradient() -> None:
    lm = wrap(tiny.model("llama"))
    path = (("head", 2, 1), ("mlp", 0))
    fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED, path=path, at=[2])
    assert fitted.positions == [[5, 2, 2]]
    layer, states = lm.model.model.layers[0], []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(
        lambda m, a: states.append(a[0].detach())
    )
    with torch.no_grad():
        lm.model(torch.tensor([PROMPT]))
    hook.remove()
    x = states[0][0, 2].clone().requires_grad_(True)
    written = layer.mlp(layer.post_attention_layernorm(x)) @ fitted.vector[1]
    [true] = torch.autograd.grad(written, x)
    assert torch.allclose(fitted.vector[2], true, rtol=1e-4, atol=1e-6)
    flat = layer.mlp.up_proj.weight.T @ (layer.mlp.down_proj.weight.T @ fitted.vector[1])
    assert float(torch.cosine_similarity(flat.detach(), true, dim=0)) < 0.9


def test_in_a_linear_model_paths_add_up_to_the_observable() -> None:
    """Embedding and heads straight, then every head of the last layer by the values it read."""
    lm = linear()
    with torch.no_grad():
        logits = lm.model(torch.tensor([PROMPT])).logits[0, -1]
    total = 0.0
    for path in ((), *((("head", 1, head),) for head in range(4))):
        fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED, path=path)
        found = feature_vectors.measure(lm, [PROMPT], vectors=fitted, draws=1).isel(example=0)
        first = float(found.contribution[0].sum())
        carried = float((found.score * found.through).sum())
        if path:  # what passes is the embedding and the first layer's heads
            assert np.isnan(found.contribution.values[1]).all()
            assert abs(carried - first) > 1e-3
            total += carried
        else:
            whole, total = carried, carried - float(found.contribution[1].sum())
    assert whole == pytest.approx(float(logits[7] - logits[8]), abs=1e-5)
    assert total == pytest.approx(whole, abs=1e-5)


def test_two_hops_are_what_path_patching_finds_where_the_model_is_linear() -> None:
    lm, other = linear(), [3, 14, 61, 92, 17, 35]
    paths = [(f"L0H{one}", f"L1H{two}.v") for one in range(4) for two in range(4)]
    exact = path_patching.measure(
        lm, [PROMPT], corrupt=[other], paths=paths, answer=7, foil=8
    ).isel(example=0)
    gap = float(exact.clean_difference - exact.corrupt_difference)
    for two in range(4):
        fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED, path=(("head", 1, two),))
        found = feature_vectors.measure(lm, [PROMPT], corrupt=[other], vectors=fitted, draws=1)
        expected = [
            gap * float(exact.effect.sel(edge=f"L0H{one} -> L1H{two}.v")) for one in range(4)
        ]
        assert found.contribution.values[0, 0] == pytest.approx(expected, abs=1e-5)
        assert max(map(abs, expected)) > 1e-2


def test_coupling_by_hand() -> None:
    y = torch.tensor([[3.0, 4.0, 0.0], [6.0, 8.0, 0.0], [0.0, 1.0, 5.0]])
    found = feature_vectors.coupling(y, y)
    assert found[0].tolist() == pytest.approx([1, 2, 4 / 25])
    assert found[1, 0] == 0.5
    assert found[2, 0] == pytest.approx(4 / 26)


def test_what_is_added_along_a_vector_moves_another_by_their_coupling() -> None:
    lm = linear()
    one, two = (
        feature_vectors.fit(lm, [PROMPT], observable=asked) for asked in (ASKED, {9: 1.0, 8: -1.0})
    )
    found = feature_vectors.measure(lm, [PROMPT], vectors=one, others=[two], draws=1)
    assert found.sizes["edge"] == 4
    step = one.vector[0] / one.vector[0].square().sum()  # raises the first by one
    with intervene(lm, add("layers.1.resid_post", step, positions=-1)), torch.no_grad():
        moved = lm([PROMPT])["logits"][0, -1]
    with torch.no_grad():
        still = lm.model(torch.tensor([PROMPT])).logits[0, -1]
    change = moved - still
    assert float(change[7] - change[8]) == pytest.approx(1, abs=1e-5)
    edge = f"{one.names[0]} -> {two.names[0]}"
    expected = float(found.coupling.sel(edge=edge))
    assert float(change[9] - change[8]) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - 1) > 0.05


def test_the_planted_head_is_first_and_the_name_is_where_its_vector_looks() -> None:
    p = planted.copy_head()
    [(layer, head)] = p.heads
    lm, observable = wrap(p.model, p.tokenizer), {p.answer: 1.0, p.foil: -1.0}
    straight = feature_vectors.fit(lm, p.clean, observable=observable)
    found = feature_vectors.measure(lm, p.clean, vectors=straight).isel(example=0)
    order = found.contribution.values.ravel().argsort()[::-1]
    assert divmod(int(order[0]), 4) == (layer, head)
    assert float(found.contribution[layer, head]) > 10 * float(found.null_contribution.max())
    fitted = feature_vectors.fit(lm, p.clean, observable=observable, path=(("head", layer, head),))
    assert fitted.positions[0] == list(p.positions[::-1])
    read = feature_vectors.measure(lm, p.clean, vectors=fitted).isel(example=0)
    assert int(read.score.values.argmax()) == p.positions[0]
    away = feature_vectors.measure(lm, p.corrupt, vectors=fitted).isel(example=0)
    assert int(away.score.values.argmin()) == p.positions[0]


def test_a_folder_serves_as_its_fit(tmp_path: Path) -> None:
    lm = wrap(tiny.model("llama"))
    path = (("head", *np.array([1, 0])),)  # as an index of a result gives them
    fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED, path=path)
    fitted.save(tmp_path / "fit")
    one, two = (
        feature_vectors.measure(lm, [PROMPT], vectors=given)
        for given in (fitted, str(tmp_path / "fit"))
    )
    assert one.identical(two)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": (("head", 3, 0),)}, "layers run from 0 to 2"),
        ({"path": (("head", 1, 4),)}, "heads to 3"),
        ({"path": (("head", 1, 0), ("mlp", 1))}, "not heard"),
        ({"path": (("mlp", 1, 0),)}, "write"),
        ({"path": (("head", 1, 0),), "at": [6]}, "position 6 of a prompt of 6"),
        ({"path": (("mlp", 1),), "at": [2]}, "1 positions for 0 heads"),
        ({"observable": {7: 0.0}}, "zero"),
        ({"observable": {96: 1.0}}, "none of this model's 96 outputs"),
    ],
)
def test_what_cannot_be_fitted_is_refused(given, said) -> None:
    lm = wrap(tiny.model("llama"))
    with pytest.raises(InputError, match=said):
        feature_vectors.fit(lm, [PROMPT], **({"observable": ASKED} | given))


def test_vectors_of_another_model_and_unequal_pairs_are_refused() -> None:
    lm = wrap(tiny.model("llama"))
    fitted = feature_vectors.fit(lm, [PROMPT], observable=ASKED)
    with pytest.raises(InputError, match="differ in length"):
        feature_vectors.measure(lm, [PROMPT], corrupt=[PROMPT[:4]], vectors=fitted)
    p = planted.copy_head()
    with pytest.raises(InputError, match="width 32"):
        feature_vectors.measure(wrap(p.model, p.tokenizer), p.clean, vectors=fitted)
    with pytest.raises(SiteError, match="not a sum"):
        feature_vectors.fit(wrap(tiny.model("bert")), [PROMPT], observable=ASKED)
