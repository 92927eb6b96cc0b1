"""Direct logit attribution against plain Hugging Face and planted heads: all parts are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from stratoscope.engine.intervene import add, intervene
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import head_writes
from stratoscope.lab import planted
from stratoscope.layers import direct_logit_attribution
from stratoscope.models import load, wrap
from stratoscope.store.cache import cache_root
from support import tiny

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
ONE_TOKEN = "adds up to logits, not to log probabilities"

PROMPT, OTHER = [3, 14, 15, 92, 65, 35], [3, 14, 17, 92, 61, 35]


@pytest.mark.parametrize("name", [n for n in tiny.DECODERS if n != "mixtral"])
def test_direct_contributions_add_up_to_hugging_faces_difference(name: str) -> None:
    lm = wrap(tiny.model(name))
    found = direct_logit_attribution.measure(lm, [PROMPT], answer=7, foil=8)
    # before any soft-cap: the sum is of logits as the head gives them
    hidden: list[torch.Tensor] = []
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
    # the foil itself is 0
    mean = np.concatenate([against, np.zeros_like(against[:1])]).mean(axis=0)
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
    found = direct_logit_attribution.measure(
        wrap(p.model, p.tokenizer), p.clean, answer=p.foil, foil=p.answer
    )
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
    found = direct_logit_attribution.measure(
        wrap(p.model, p.tokenizer), p.clean, answer=p.answer, foil=p.foil
    )["contribution"].isel(example=0)
    writer = max(p.heads)  # of the last layer: earlier planted heads only feed it
    assert found["component"].values[int(found.argmax("component"))] == f"L{writer[0]}H{writer[1]}"
    rest = abs(found.drop_sel(component=f"L{writer[0]}H{writer[1]}"))
    assert float(rest.max()) < 0.1 * float(found.max())


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
