"""Composition of heads: closed forms, the weights by Hugging Face's own names, and a planted
circuit found from weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import composition
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": {}, "edit": {"request": [(0, 1)]}}


def test_svd_of_a_product_is_the_svd() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 9, 3), torch.randn(2, 3, 9)
    u, s, vt = composition.svd_of_product(left, right)
    close(u @ torch.diag_embed(s) @ vt, left @ right)
    close(s, torch.linalg.svdvals(left @ right)[:, :3])
    close(u.mT @ u, torch.eye(3).expand(2, 3, 3))


def test_composition_by_hand() -> None:
    outer, inner = torch.tensor([[3.0], [4.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    # the product reads dim 1 alone, so a direction scores its share along it
    close(composition.composition(outer, inner, torch.eye(3)[None]), [[0.0, 1.0, 0.0]])
    close(composition.composition(outer, inner, torch.full((1, 3, 1), 3**-0.5)), [[3**-0.5]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reads_and_writes_are_the_models_own_matrices(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found, o = composition.reads(lm), composition.writes(lm)
    if name == "llama":
        layer = lm.model.model.layers[1]
        own = [
            getattr(layer.self_attn, f"{side}_proj").weight * layer.input_layernorm.weight
            for side in "qkv"
        ]
        own = [w.detach().unflatten(0, (-1, 8)).repeat_interleave(32 // len(w), dim=0) for w in own]
        close(o[1, 2], layer.self_attn.o_proj.weight[:, 16:24].detach())
    else:
        layer = lm.model.transformer.h[1]
        centred = torch.eye(32) - 1 / 32
        joined = (layer.attn.c_attn.weight.T * layer.ln_1.weight) @ centred
        # LayerNorm makes a one-hot probe a little louder than RMSNorm does: one factor for all
        own = [w.detach().unflatten(0, (4, 8)) / (1 - 1 / 32) ** 0.5 for w in joined.split(32)]
        close(o[1, 2], layer.attn.c_proj.weight[16:24].T.detach())
    close(found[:, 1], torch.stack(own), 1e-3)


def test_scores_are_norms_of_products() -> None:
    lm = lm_of("llama")
    found = composition.measure(lm, ROWS)
    (q, k, v), o = composition.reads(lm), composition.writes(lm)
    norm = lambda x: x.norm().item()  # noqa: E731
    for name, left in (
        ("L2H3.q", k[2, 3].T @ q[2, 3]),
        ("L2H3.k", q[2, 3].T @ k[2, 3]),
        ("L2H3.v", o[2, 3] @ v[2, 3]),
    ):
        written = o[0, 1] @ v[0, 1]
        edge = found.sel(edge=f"L0H1 -> {name}")
        assert edge.score.item() == pytest.approx(
            norm(left @ written) / norm(left) / norm(written), rel=1e-3
        )
        u = torch.linalg.svd(written).U[:, : lm.dims.head_dim]
        alone = [norm(left @ column) / norm(left) for column in u.T]
        assert edge.component_score.item() == pytest.approx(max(alone), rel=1e-3)
        assert edge.component.item() == int(np.argmax(alone))
    close(found.used.sum("rank"), np.ones((3, 4)))
    assert composition.measure(lm, ROWS, top=1).component.max() == 0
    with pytest.raises(InputError, match="choose 1 to 8"):
        composition.measure(lm, ROWS, top=9)


@pytest.mark.parametrize("p", [planted.induction(), planted.induction_gpt2()], ids=lambda p: p.name)
def test_the_planted_k_composition_ranks_first(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    found = composition.measure(lm, p.clean)
    assert str(found.edge.values[found.score.values.argmax()]) == "L0H1 -> L1H2.k"
    order = found.edge.values[np.argsort(-found.component_score.values)].tolist()
    # grouped queries: L1H3 has the keys of L1H2, so that one direction of its random query listens
    # as well
    assert order.index("L0H1 -> L1H2.k") <= (p.name == "induction")
    planted_score, rest = (
        found.score.sel(edge="L0H1 -> L1H2.k"),
        found.score.where(found.sender != "L0H1"),
    )
    assert planted_score > 2 * found.null
    assert rest.max() < 1.2 * found.null


def test_edit_scales_what_the_component_writes() -> None:
    for name in ("llama", "gpt2"):
        lm = lm_of(name)
        o, v = composition.writes(lm), composition.reads(lm)[2]
        before = o[1, 2] @ v[1, 2]
        u, s, vt = torch.linalg.svd(before)
        with untouched(lm), composition.edit(lm, [(1, 2)], components=[0, 2], factor=3.0):
            after = composition.writes(lm)
        expected = before + 2 * sum(s[r] * torch.outer(u[:, r], vt[r]) for r in (0, 2))
        close(after[1, 2] @ v[1, 2], expected, 1e-3)
        rest = torch.ones(3, 4, dtype=torch.bool)
        rest[1, 2] = False
        assert torch.equal(after[rest], o[rest])
        whole = range(lm.dims.head_dim)
        with composition.edit(lm, [(1, 2)], components=whole), torch.no_grad():
            silent = lm(padded(ROWS, "left"))["logits"]
        with composition.edit(lm, [(1, 2)], components=whole, null=5), torch.no_grad():
            # all random directions together are all there are
            close(lm(padded(ROWS, "left"))["logits"], silent, 1e-3)


def test_refusals() -> None:
    lm = lm_of("llama")
    for request, options, said in (
        ([(1, 4)], {}, "0 to 2 and 3"),
        ([(1, 2)], {"components": [8]}, "numbered from 0"),
        ([(1, 2)], {"components": []}, "numbered from 0"),
    ):
        with pytest.raises(InputError, match=said):
            composition.edit(lm, request, **options)
    with pytest.raises(SiteError, match="norms what its heads write"):
        composition.edit(lm_of("gemma2"), [(1, 2)])
    for name in ("qwen3", "olmo2"):
        with pytest.raises(SiteError, match="not linear"):
            composition.measure(lm_of(name), ROWS)
    with pytest.raises(SiteError, match="ALiBi"):
        composition.measure(lm_of("bloom"), ROWS)


def test_one_layer_has_no_edges_between_layers() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    with pytest.raises(SiteError, match="one layer: no head writes before another"):
        composition.measure(wrap(LlamaForCausalLM(config).eval()), [[3, 4, 5]])
