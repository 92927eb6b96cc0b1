"""Architectures that no family names: guessed rightly, or refused in a sentence; never silently
wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError
from stratoscope.models import families, plain_run, wrap
from stratoscope.models.lm import LM
from stratoscope.models.prove import checks
from support import tiny

G, S = tiny.GROUPED, tiny.SMALL
_GPT = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 4,
}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_XGLM = {"vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
_MPT = {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 96, "max_seq_len": 64}
_ENDS = {"mask_token_id": 3}

# architecture -> (what makes it, what must come of it: a residual kind, or "refused" with a part of
# the reason)
UNKNOWN: dict[str, tuple[Any, str]] = {
    "starcoder2": (lambda: (hf.Starcoder2ForCausalLM, hf.Starcoder2Config(**G)), "sequential"),
    "starcoder2 base": (lambda: (hf.Starcoder2Model, hf.Starcoder2Config(**G)), "sequential"),
    "stablelm": (lambda: (hf.StableLmForCausalLM, hf.StableLmConfig(**G)), "sequential"),
    "stablelm parallel": (
        lambda: (hf.StableLmForCausalLM, hf.StableLmConfig(**G, use_parallel_residual=True)),
        "parallel",
    ),
    "granite": (lambda: (hf.GraniteForCausalLM, hf.GraniteConfig(**G)), "sequential"),
    "granite scaled inside": (
        lambda: (
            hf.GraniteForCausalLM,
            hf.GraniteConfig(**G, embedding_multiplier=3.0, attention_multiplier=0.3),
        ),
        "sequential",
    ),
    "granite residual multiplier": (
        lambda: (hf.GraniteForCausalLM, hf.GraniteConfig(**G, residual_multiplier=0.5)),
        "sequential",
    ),
    "granite logits scaling": (
        lambda: (hf.GraniteForCausalLM, hf.GraniteConfig(**G, logits_scaling=4.0)),
        "sequential",
    ),
    "olmo": (lambda: (hf.OlmoForCausalLM, hf.OlmoConfig(**G)), "sequential"),
    "olmo3": (lambda: (hf.Olmo3ForCausalLM, hf.Olmo3Config(**G)), "sequential"),
    "cohere": (lambda: (hf.CohereForCausalLM, hf.CohereConfig(**G)), "parallel"),
    "cohere unscaled": (
        lambda: (hf.CohereForCausalLM, hf.CohereConfig(**G, logit_scale=1.0)),
        "parallel",
    ),
    "cohere2": (
        lambda: (hf.Cohere2ForCausalLM, hf.Cohere2Config(**G, logit_scale=1.0)),
        "parallel",
    ),
    "gptj": (lambda: (hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT)), "parallel"),
    "codegen": (lambda: (hf.CodeGenForCausalLM, hf.CodeGenConfig(**_GPT, n_ctx=64)), "parallel"),
    "falcon": (lambda: (hf.FalconForCausalLM, hf.FalconConfig(**S)), "parallel"),
    "falcon new": (
        lambda: (
            hf.FalconForCausalLM,
            hf.FalconConfig(**S, new_decoder_architecture=True, num_kv_heads=2),
        ),
        "parallel",
    ),
    "phi": (lambda: (hf.PhiForCausalLM, hf.PhiConfig(**S)), "parallel"),
    "persimmon": (lambda: (hf.PersimmonForCausalLM, hf.PersimmonConfig(**S)), "sequential"),
    "smollm3": (lambda: (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**G)), "sequential"),
    "eurobert": (lambda: (hf.EuroBertForMaskedLM, hf.EuroBertConfig(**G, **_ENDS)), "sequential"),
    "mpt": (lambda: (hf.MptForCausalLM, hf.MptConfig(**_MPT)), "sequential"),
    "glm": (lambda: (hf.GlmForCausalLM, hf.GlmConfig(**G, head_dim=8)), "sequential"),
    "nemotron": (lambda: (hf.NemotronForCausalLM, hf.NemotronConfig(**G)), "sequential"),
    "gpt_oss": (
        lambda: (hf.GptOssForCausalLM, hf.GptOssConfig(**G, head_dim=8, num_local_experts=4)),
        "sequential",
    ),
    "xglm": (lambda: (hf.XGLMForCausalLM, hf.XGLMConfig(**_XGLM)), "sequential"),
}


def build(name: str) -> Any:
    kind, config = UNKNOWN[name][0]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", UNKNOWN)
def test_guessed_rightly_or_refused(name: str) -> None:
    model, expected = build(name), UNKNOWN[name][1]
    assert families.find(model.config) is None, (
        "this architecture has a family by now: take it off the list"
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if expected.startswith("refused"):
        with pytest.raises(FamilyError) as caught:
            wrap(model)
        assert hooks(model) == 0
        assert expected.removeprefix("refused: ") in str(caught.value)
        assert str(caught.value).endswith("refused.")
    else:
        lm = wrap(model)
        # later Hugging Face puts up some of its own, to report hidden states
        assert hooks(model) == 0
        assert lm.family.towers[""].residual == expected
        assert [c for c in checks(lm, tiny.inputs("llama")) if not c.holds] == []
        agrees_with_hugging_face(lm)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def agrees_with_hugging_face(lm: LM) -> None:
    given = tiny.arguments("llama")
    real = given["attention_mask"].bool()
    plain = lm.model(**given, output_hidden_states=True)
    seen = capture(lm, tiny.inputs("llama"), "layers.*.resid_pre", "layers.*.resid_post")
    # not to the bit: a matrix product's last bits may depend on where it lies in memory
    for layer in range(lm.dims.layers):
        assert (
            tiny.gap(seen[f"layers.{layer}.resid_pre"][real], plain.hidden_states[layer][real])
            < 1e-6
        )
        if layer:
            assert (
                tiny.gap(
                    seen[f"layers.{layer - 1}.resid_post"][real], plain.hidden_states[layer][real]
                )
                < 1e-6
            )
    with trace(lm, *lm.sites(), stop=False):
        output = lm(tiny.inputs("llama"))
    first = next(iter(output.keys()))
    assert tiny.gap(output[first][real], plain[first][real]) < 1e-4
    assert ("logits" in plain) == (
        lm.layout.lack(lm.layout.resolve_one("embed")) is None and bool(lm.layout.head)
    )
    later = dict(given, input_ids=given["input_ids"].clone())
    later["input_ids"][0, -1] = 60
    moved = lm.model(**later)[first][0, :-1]
    assert (tiny.gap(moved, plain[first][0, :-1]) < 1e-5) == lm.family.towers[""].causal


def test_the_refusal_names_what_the_layer_does() -> None:
    """A multiplier that no attribute names is measured, and told as what it is."""
    model = build("granite residual multiplier")
    for layer in model.model.layers:
        layer.half = layer.residual_multiplier
        layer.forward = _halved.__get__(layer)
        del layer.residual_multiplier
    with pytest.raises(
        FamilyError,
        match=r"a multiplier before the sum: it gives 1 x the stream \+ 0.5 x `self_attn` \+ 0.5 x "
        r"`mlp`",
    ):
        wrap(model)


def _halved(self: Any, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
    hidden_states = (
        hidden_states + self.half * self.self_attn(self.input_layernorm(hidden_states), **rest)[0]
    )
    return hidden_states + self.half * self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("read", "seam"),
    [
        (lambda z: z, "open"),
        (lambda z: z * torch.tensor([0.5, 2.0, -1.0])[:, None], "gated"),  # head by head
        (lambda z: z / z.norm(dim=(-1, -2), keepdim=True), "closed"),  # heads are joined
        (lambda z: torch.ones_like(z), "closed"),  # what the interface gives is not read at all
    ],
)
def test_how_attention_is_reached(read: Any, seam: str) -> None:
    """Values (example, position, head, head_dim) given with and without the first head, and what
    the projection takes."""
    whole = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    given = torch.cat([0 * whole[:, :, :1], whole[:, :, 1:]], dim=2)
    assert plain_run._seam(given, read(whole).flatten(2), read(given).flatten(2)) == seam
