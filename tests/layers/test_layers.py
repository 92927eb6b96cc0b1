"""The layer methods against plain Hugging Face, closed forms and planted truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from stratoscope.engine.intervene import add, intervene, replaced
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import head_writes
from stratoscope.errors import MemoryRefusal
from stratoscope.lab import planted
from stratoscope.layers import activation_patching, direct_logit_attribution, logit_lens
from stratoscope.models import LM, load, wrap
from stratoscope.store.cache import cache_root
from support import tiny

PROMPT, OTHER = [3, 14, 15, 92, 65, 35], [3, 14, 17, 92, 61, 35]


def lm_of(p: planted.Planted) -> LM:
    return wrap(p.model, p.tokenizer)


def asked(p: planted.Planted) -> dict[str, Any]:
    return {"answer": p.answer, "foil": p.foil}


def test_answer_rank_counts_what_scores_higher() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 5.0, 1.0, 0.0]])
    assert logit_lens.answer_rank(logits, torch.tensor([2, 3])).tolist() == [1, 3]
    assert logit_lens.answer_rank(logits, torch.tensor([1, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_logit_lens_equals_plain_hugging_face(name: str) -> None:
    lm = wrap(tiny.model(name))
    found = logit_lens.measure(lm, [PROMPT], answer=7, top=3)
    with torch.no_grad():
        out = lm.model(torch.tensor([PROMPT]), output_hidden_states=True)
        last = out.logits.softmax(-1)[0]
        middle = lm.model.lm_head(lm.layout.final_norm(out.hidden_states[1]))[0]
    if name == "gemma2":
        cap = lm.model.config.final_logit_softcapping
        middle = torch.tanh(middle / cap) * cap
    for depth, expected in ((1, middle.softmax(-1)), (lm.dims.layers, last)):
        values = torch.tensor(found["probability"].values[0, depth])
        torch.testing.assert_close(values, expected.topk(3).values, rtol=1e-4, atol=1e-6)
        chosen = torch.tensor(found["answer_probability"].values[0, depth])
        torch.testing.assert_close(chosen, expected[:, 7], rtol=1e-4, atol=1e-6)
        ranks = (expected > expected[:, [7]]).sum(-1)
        assert found["answer_rank"].values[0, depth].tolist() == ranks.tolist()


def test_the_logit_lens_in_pieces_is_the_logit_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are small enough (that is what bounds memory), and change nothing."""
    lm = wrap(tiny.model("llama"))
    rows = [[*PROMPT, 5, 6], OTHER, PROMPT[:2], [*OTHER, 9]]
    whole = logit_lens.measure(lm, rows, answer=7)
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(logit_lens, "_STREAMS", 2 * 8 * 4 * lm.dims.dim * (lm.dims.layers + 1))
    monkeypatch.setattr(logit_lens, "_LOGITS", 3 * 4 * lm.dims.vocab)
    told, told_of, seen = [], logit_lens.told, logit_lens.capture
    monkeypatch.setattr(
        logit_lens, "told", lambda x, *rest: (told.append(len(x)), told_of(x, *rest))[1]
    )
    monkeypatch.setattr(
        logit_lens, "capture", lambda lm, b, *s: (sizes.append(b.ids.shape), seen(lm, b, *s))[1]
    )
    calls: list[tuple[int, int]] = []
    pieces = logit_lens.measure(lm, rows, answer=7, progress=lambda *at: calls.append(at))
    assert sizes == [(2, 8), (2, 7)]
    assert max(told) == 3
    assert calls[-1] == (sum(map(len, rows)) * (lm.dims.layers + 1),) * 2
    for name in whole.data_vars:
        if whole[name].dtype.kind == "f":
            np.testing.assert_allclose(
                pieces[name].values, whole[name].values, rtol=1e-5, atol=1e-7
            )
        else:
            assert (pieces[name].values == whole[name].values).all()
    # a change that numbers its examples counts those of the user's batch
    sizes.clear()
    with intervene(lm, replaced("layers.0.mlp.out", 0.0, examples=[3])):
        changed = logit_lens.measure(lm, rows, answer=7).answer_probability.values
    assert sizes == [(4, 8)]
    moved = abs(np.nan_to_num(changed - pieces.answer_probability.values)).max(axis=(1, 2))
    assert (moved > 1e-6).tolist() == [False, False, False, True]


def test_a_logit_lens_too_large_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny.model("llama"))
    monkeypatch.setattr(logit_lens, "available", lambda device: 10_000)
    with pytest.raises(MemoryRefusal, match="the logit lens of 1 prompts of 6 tokens would take"):
        logit_lens.measure(lm, PROMPT, top=60)


def test_logit_lens_sees_the_planted_fact_come_in() -> None:
    p = planted.fact_lookup()
    [(layer, _)] = p.neurons
    rank = logit_lens.measure(lm_of(p), p.clean, answer=p.answer)["answer_rank"].values[0, :, -1]
    assert rank[layer + 1] == 0
    assert rank[layer] > 0


@pytest.mark.parametrize("name", [n for n in tiny.DECODERS if n != "mixtral"])
def test_direct_contributions_add_up_to_hugging_faces_difference(name: str) -> None:
    lm = wrap(tiny.model(name))
    found = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8)
    hidden: list[
        torch.Tensor
    ] = []  # before any soft-cap: the sum is of logits as the head gives them
    hook = lm.layout.head[-1].register_forward_hook(lambda m, a, out: hidden.append(out.detach()))
    try:
        lm.model(torch.tensor([PROMPT]))
    finally:
        hook.remove()
    expected = float(hidden[0][0, -1, 7] - hidden[0][0, -1, 8])
    assert float(found["contribution"].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(float(found["residual_error"][0])) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_both_halves_of_a_contribution_are_counted_from_the_mean_over_the_vocabulary(
    name: str,
) -> None:
    """By hand: every token's share of one head's write, through the final norm with its scale
    held."""
    lm = wrap(tiny.model(name))
    found = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8).isel(example=0)
    every = [t for t in range(lm.dims.vocab) if t != 8]
    over = direct_logit_attribution.measure(lm, [PROMPT] * len(every), answer=every, foil=8)
    against = over["contribution"].values  # (token, component): token - foil
    at = every.index(7)
    mean = np.concatenate([against, np.zeros_like(against[:1])]).mean(
        axis=0
    )  # the foil itself is 0
    assert found["raises_answer"].values == pytest.approx(against[at] - mean, abs=1e-5)
    assert found["lowers_foil"].values == pytest.approx(mean, abs=1e-5)
    both = found["raises_answer"] + found["lowers_foil"]
    assert both.values == pytest.approx(found["contribution"].values, abs=1e-6)


def test_both_halves_of_a_read_out_with_a_bias() -> None:
    """Summed over components they are the logits of plain Hugging Face, counted from the mean of
    all logits."""
    torch.manual_seed(0)
    model = hf.PhiForCausalLM(hf.PhiConfig(**tiny.SMALL)).eval()
    model.lm_head.bias.data = torch.linspace(0, 3, 96)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].double()
    found = direct_logit_attribution.measure(wrap(model), [PROMPT], answer=7, foil=8).isel(
        example=0
    )
    assert float(found["raises_answer"].sum()) == pytest.approx(
        float(logits[7] - logits.mean()), abs=1e-4
    )
    assert float(found["lowers_foil"].sum()) == pytest.approx(
        float(logits.mean() - logits[8]), abs=1e-4
    )


@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "resid_post", "attn.out"])
def test_what_is_added_to_the_stream_outside_is_a_component(point: str) -> None:
    """Its sum with all others is the difference that the changed model gives."""
    lm, vector = wrap(tiny.model("llama")), torch.linspace(-1.5, 2.0, 32)
    with intervene(lm, add(f"layers.1.{point}", vector)), torch.no_grad():
        logits = lm([PROMPT])["logits"][0, -1]
        found = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8).isel(example=0)
    assert "outer change" in found["component"].values
    assert float(found["total"]) == pytest.approx(float(logits[7] - logits[8]), abs=1e-4)


def test_a_head_that_only_suppresses_the_foil_is_not_said_to_write_the_answer() -> None:
    p = planted.suppression()
    [(layer, head)] = p.opposing_heads  # it speaks against the name that was said: here the foil
    found = direct_logit_attribution.measure(lm_of(p), p.clean, answer=p.foil, foil=p.answer)
    one = found.isel(example=0).sel(component=f"L{layer}H{head}")
    assert float(one["contribution"]) > 1
    share = {
        part: float(one[part] / one["contribution"]) for part in ("raises_answer", "lowers_foil")
    }
    assert share["lowers_foil"] > 0.9
    assert abs(share["raises_answer"]) < 0.1


@pytest.mark.skipif(
    not (cache_root() / "models" / "smollm2").is_dir(), reason="SmolLM2 is not in the cache"
)
def test_the_head_of_the_flagship_sentence_suppresses_john_and_does_not_write_mary() -> None:
    """John is the lowest of all tokens in what L23H3 writes; Mary stands near the middle."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    lm = load("smollm2")
    found = direct_logit_attribution.measure(lm, prompt, answer=" Mary", foil=" John")
    one = found.isel(example=0).sel(component="L23H3")
    assert float(one["raises_answer"]) == pytest.approx(-0.08, abs=0.01)
    assert float(one["lowers_foil"]) == pytest.approx(2.94, abs=0.01)


@pytest.mark.parametrize("make", [planted.copy_head, planted.induction, planted.induction_gpt2])
def test_direct_attribution_names_the_head_that_writes(make: Any) -> None:
    p = make()
    found = direct_logit_attribution.measure(lm_of(p), p.clean, **asked(p))["contribution"].isel(
        example=0
    )
    writer = max(p.heads)  # of the last layer: earlier planted heads only feed it
    assert found["component"].values[int(found.argmax("component"))] == f"L{writer[0]}H{writer[1]}"
    rest = abs(found.drop_sel(component=f"L{writer[0]}H{writer[1]}"))
    assert float(rest.max()) < 0.1 * float(found.max())


def test_patching_equals_plain_hooks() -> None:
    lm = wrap(tiny.model("llama"))
    found = activation_patching.measure(lm, [PROMPT], corrupt=[OTHER], answer=7, foil=8)
    model, clean, corrupt = lm.model, torch.tensor([PROMPT]), torch.tensor([OTHER])
    with torch.no_grad():
        source = model(clean, output_hidden_states=True).hidden_states
        ends = [float((x := model(ids).logits[0, -1])[7] - x[8]) for ids in (clean, corrupt)]
        for layer, position in ((0, 2), (1, 4), (2, 5)):

            def put(
                module: Any, args: tuple, layer: int = layer, position: int = position
            ) -> tuple:
                changed = args[0].clone()
                changed[:, position] = source[layer][:, position]
                return (changed, *args[1:])

            hook = model.model.layers[layer].register_forward_pre_hook(put)
            logits = model(corrupt).logits[0, -1]
            hook.remove()
            expected = (float(logits[7] - logits[8]) - ends[1]) / (ends[0] - ends[1])
            assert float(found["effect"][0, layer, position]) == pytest.approx(
                expected, rel=1e-3, abs=1e-3
            )


@pytest.mark.parametrize("make", [planted.copy_head, planted.fact_lookup_moved])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_follows_the_planted_path(make: Any, direction: str) -> None:
    p = make()
    lm = lm_of(p)
    found = activation_patching.measure(
        lm, p.clean, corrupt=p.corrupt, direction=direction, **asked(p)
    )
    effect = found["effect"].values[0]
    differ = [i for i, (a, b) in enumerate(zip(p.clean.split(), p.corrupt.split())) if a != b]
    assert effect[0, differ].max() == pytest.approx(
        1, abs=0.05
    )  # at the entry all is where the prompts differ
    same = [i for i in range(effect.shape[1]) if i not in differ]
    assert abs(effect[0, same]).max() < 0.05
    last = activation_patching.measure(
        lm, p.clean, corrupt=p.corrupt, direction=direction, site="resid_post", **asked(p)
    )["effect"].values[0, -1]
    assert last[-1] == pytest.approx(
        1, abs=1e-3
    )  # after the last layer only the last token is read
    assert abs(last[:-1]).max() < 1e-3
    assert abs(found["null"]).max() < 0.5


def test_heads_and_rest_sum_to_attention_through_a_norm_with_a_bias() -> None:
    model = tiny.model("gemma2")
    for layer in model.model.layers:
        layer.post_attention_layernorm = torch.nn.LayerNorm(32)
        torch.nn.init.uniform_(layer.post_attention_layernorm.bias, 1, 2)
    lm = wrap(model)
    with torch.no_grad():
        seen = capture(lm, [PROMPT], "layers.1.attn.z", "layers.1.attn.out", positions=-1)
        heads, rest = head_writes(lm, 1, seen["layers.1.attn.z"])
    assert tiny.gap((heads.sum(dim=1) + rest).float(), seen["layers.1.attn.out"]) < 1e-5
