"""Config keys: what nobody has thought about is refused by name; what changes no site is let
through, and proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from stratoscope.errors import FamilyError
from stratoscope.models import wrap
from stratoscope.models.prove import checks
from support import tiny

GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 96}


def build(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (
            lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, reorder_and_upcast_attn=True)),
            "reorder_and_upcast_attn",
        ),
        (
            lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, add_cross_attention=True)),
            "add_cross_attention",
        ),
        (
            lambda: (
                hf.OPTForCausalLM,
                hf.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
            ),
            "do_layer_norm_before",
        ),
        (
            lambda: (hf.OPTForCausalLM, hf.OPTConfig(**OPT, word_embed_proj_dim=16)),
            "word_embed_proj_dim",
        ),
        (
            lambda: (
                hf.BloomForCausalLM,
                hf.BloomConfig(**BLOOM, apply_residual_connection_post_layernorm=True),
            ),
            "apply_residual_connection_post_layernorm",
        ),
        (lambda: (hf.BertForMaskedLM, hf.BertConfig(**tiny.SMALL, is_decoder=True)), "is_decoder"),
        (
            lambda: (hf.RobertaForMaskedLM, hf.RobertaConfig(**tiny.SMALL, is_decoder=True)),
            "is_decoder",
        ),
        (
            lambda: (
                hf.MixtralForCausalLM,
                hf.MixtralConfig(**tiny.GROUPED, num_local_experts=4, router_jitter_noise=0.1),
            ),
            "router_jitter_noise",
        ),
        (
            lambda: (
                hf.Gemma2ForCausalLM,
                hf.Gemma2Config(**tiny._sliding(use_bidirectional_attention=True)),
            ),
            "use_bidirectional_attention",
        ),
    ],
)
def test_an_unhandled_key_is_refused_by_name(make: Any, key: str) -> None:
    with pytest.raises(FamilyError, match=f"`{key}`"):
        wrap(build(*make()))


def test_a_key_inside_a_vision_language_config_is_seen() -> None:
    kind, config = tiny.CONFIGS["llava"]()
    config.text_config.pretraining_tp = 2
    with pytest.raises(FamilyError, match="`pretraining_tp` = 2"):
        wrap(build(kind, config))


def test_a_key_the_class_does_not_declare_changes_nothing_and_is_ignored() -> None:
    config = hf.LlamaConfig(
        **tiny.GROUPED, is_llama_config=True, rope_interleaved=False, anything={"a": 1}
    )
    assert config.anything == {"a": 1}
    assert wrap(build(hf.LlamaForCausalLM, config)).family.name == "llama"


# keys that a family says it handles, or that are common, away from their defaults
HANDLED: dict[str, Any] = {
    "llama biases": lambda: (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **tiny.GROUPED, attention_bias=True, mlp_bias=True, head_dim=16, hidden_act="gelu"
        ),
    ),
    "qwen2 windows": lambda: (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(
            **tiny.GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1
        ),
    ),
    "phi3 partial rotary": lambda: (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**tiny.GROUPED, partial_rotary_factor=0.5, sliding_window=3),
    ),
    "gpt2 layer scales": lambda: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=40),
    ),
    "gpt2 unscaled": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, scale_attn_weights=False)),
    "gpt_neox": lambda: (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**tiny.SMALL, attention_bias=False),
    ),
    "opt without biases": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            **OPT, word_embed_proj_dim=32, enable_bias=False, layer_norm_elementwise_affine=False
        ),
    ),
    "mixtral one expert": lambda: (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(
            **tiny.GROUPED, num_local_experts=4, num_experts_per_tok=1, sliding_window=3
        ),
    ),
    "gemma3 bidirectional": lambda: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**tiny._sliding(use_bidirectional_attention=True)),
    ),
    "distilbert sinusoids": lambda: (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(**DISTIL, sinusoidal_pos_embds=True),
    ),
    "modernbert as published": lambda: (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(
            **tiny.SMALL,
            cls_token_id=1,
            sep_token_id=2,
            classifier_pooling="mean",
            norm_bias=True,
            decoder_bias=False,
            global_attn_every_n_layers=2,
            local_attention=4,
            classifier_bias=True,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "bert for pretraining": lambda: (
        hf.BertForPreTraining,
        hf.BertConfig(**tiny.SMALL, type_vocab_size=4),
    ),
    "bert for questions": lambda: (hf.BertForQuestionAnswering, hf.BertConfig(**tiny.SMALL)),
    "llama for classes": lambda: (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig(**tiny.GROUPED, num_labels=3),
    ),
    "llama without head": lambda: (hf.LlamaModel, hf.LlamaConfig(**tiny.GROUPED)),
}


@pytest.mark.parametrize("case", HANDLED)
def test_what_is_handled_is_proved(case: str) -> None:
    model = build(*HANDLED[case]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    lm = wrap(model)
    # without padding Transformers may skip the mask
    for prompts in tiny.inputs("llama"), [[3, 14, 15, 92, 65]]:
        assert [c for c in checks(lm, prompts) if not c.holds] == []
