"""A tiny random instance of every causal language model type of Transformers that fits on a laptop:
makers and inputs.

`MAKERS` says what differs from a width of 32 and two layers; `NOT_BUILT` names the other types, and
why. Weights are spread so that attention, norms, experts and multipliers matter: an instance on
which a wrong table would pass is useless.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from stratoscope.models import wrap

hf.logging.set_verbosity_error()
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT = _ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}
_H = {"head_dim": 8}
_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOE = dict.fromkeys(_NAMES, 4) | {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_topk": 2,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}
_DENSE_FIRST = _MOE | _GROUPS | {"first_k_dense_replace": 1}
_MLA = {"num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
_MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_SSM = {
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}
_SSM |= {"mamba_d_conv": 4, "mamba_chunk_size": 8, "mamba_d_ssm": 64}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_HYBRID = _H | _LINEAR | {"layer_types": ["linear_attention", "full_attention"]}
_WINDOW = {"sliding_window": 4}
_GEMMA = _H | _WINDOW | {"query_pre_attn_scalar": 8}
_GRANITE = {
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 4.0,
}
_SHARED = {"shared_expert_intermediate_size": 24}
_INDEX = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}

# model type -> what its config has beside (or, where it does not take BASE's names, instead of)
# BASE
MAKERS: dict[str, dict[str, Any]] = {
    # dense
    "llama": {}, "mistral": _WINDOW, "qwen2": {}, "qwen3": _H, "gemma": _H, "gemma2": _GEMMA,
    "gemma3_text": _GEMMA, "olmo": {}, "olmo2": {}, "olmo3": _WINDOW, "phi": {}, "phi3": {},
    "gpt2": _GPT, "gpt_neox": {}, "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "vaultgemma": _GEMMA, "smollm3": {},
    "stablelm": {}, "starcoder2": {}, "cohere": {}, "cohere2": _H | _WINDOW,
    "gptj": _GPT | {"rotary_dim": 4}, "codegen": _GPT | {"rotary_dim": 4}, "gpt_bigcode": _GPT,
    "persimmon": {}, "helium": _H, "ernie4_5": _H, "exaone4": _WINDOW, "hunyuan_v1_dense": _H,
    "seed_oss": _H, "ministral": _H, "ministral3": _H, "cwm": _H, "nanochat": {}, "exaone": {},
    "internlm3": _H, "iquestcoder": {"head_dim": 8}, "youtu": _MLA, "granite": _GRANITE,
    "granite_swa": _GRANITE | _WINDOW, "falcon": {}, "diffllama": {}, "bitnet": {}, "glm": _H,
    "glm4": _H, "nemotron": _H, "arcee": {}, "apertus": {}, "apertus1p5_text": {}, "jais2": _H,
    "biogpt": {}, "openai-gpt": _GPT, "modernbert-decoder": {"local_attention": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "minicpm3": _MLA | {"dim_model_base": 16},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2}, "hyperclovax": _GRANITE | _H,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 4},
    "flint": {"head_dim": 8}, "doge": {}, "dory": {"head_dim": 8}, "hrm_text": {"head_dim": 8},
    "gemma4_text": _GEMMA | {"hidden_size_per_layer_input": 0, "global_head_dim": 8,
        "num_kv_shared_layers": 0},
    "gemma4_unified_text": _GEMMA | {"global_head_dim": 8, "num_kv_shared_layers": 0},
    "gemma3n_text": _GEMMA | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention",
        "full_attention"]},
    # mixtures of experts
    "mixtral": _MOE, "qwen2_moe": _MOE | _SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": _MOE | _H | {"mlp_only_layers": [0]}, "olmoe": _MOE, "flex_olmo": _MOE,
    "phimoe": _MOE, "gpt_oss": _MOE | _H | _WINDOW, "minimax_m2": _MOE | _H | {"rotary_dim": 4},
    "deepseek_v2": _DENSE_FIRST | _MLA, "deepseek_v3": _DENSE_FIRST | _MLA,
    "sarvam_mla": _DENSE_FIRST | _MLA, "dots1": _DENSE_FIRST | _H,
    "deepseek_v32": _DENSE_FIRST | _MLA | _INDEX, "glm_moe_dsa": _DENSE_FIRST | _MLA | _INDEX,
    "glm4_moe_lite": _DENSE_FIRST | _MLA, "glm4_moe": _DENSE_FIRST | _H,
    "sarvam_moe": _DENSE_FIRST | _H, "solar_open": _DENSE_FIRST | _H,
    "mimo_v2_flash": _MOE | _H | {"v_head_dim": 8}, "granitemoe": _MOE | _GRANITE,
    "granitemoe_swa": _MOE | _GRANITE,
    "granitemoeshared": _MOE | _GRANITE | {"shared_intermediate_size": 24},
    "ernie4_5_moe": _MOE | _H | {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": _MOE | _H, "exaone_moe": _MOE | _GROUPS | _H | _WINDOW, "hy_v3": _MOE | _H,
    "cohere2_moe": _MOE | _H, "mellum": _MOE | _H, "aria_text": _MOE, "laguna": _MOE | _H,
    "afmoe": _MOE | _H | {"num_dense_layers": 1, "num_shared_experts": 1},
    "llama4_text": _MOE | _H | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
        "hidden_size": 32}},
    "minimax": _MOE | _H, "jetmoe": _MOE | {"kv_channels": 8},
    "zaya": _MOE | {"num_experts_per_tok": 1},
    "longcat_flash": _MOE | _MLA | {"num_layers": 1, "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "minimax_m3_vl_text": _MOE | _H, "kolibri1": _MOE | _H, "inkling_text": _MOE | _H,
    # state spaces, convolutions, linear attention, and hybrids
    "mamba": {"state_size": 4, "expand": 2}, "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4,
        "head_dim": 8},
    "jamba": _MOE | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False},
    "bamba": _SSM | {"attn_layer_indices": [1]},
    "falcon_h1": _SSM | _H | {"attention_out_multiplier": 0.7, "ssm_out_multiplier": 1.4,
        "mlp_multipliers": [0.8, 0.6], "lm_head_multiplier": 0.5, "key_multiplier": 0.9,
        "embedding_multiplier": 2.0},
    "granitemoehybrid": _SSM | _MOE | _GRANITE | {"layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 24},
    "nemotron_h": _MOE | _H | _GROUPS | {"num_hidden_layers": 4, "layers_block_type": ["mamba",
        "attention", "mlp", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16, "moe_latent_size": None},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": _MOE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"], "head_dim": 8},
    "qwen3_next": _MOE | _HYBRID | _SHARED, "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _MOE | _HYBRID | _SHARED,
    "olmo_hybrid": _LINEAR | {"linear_num_key_heads": 4, "layer_types": ["linear_attention",
        "full_attention"]},
    "bailing_hybrid": _MOE | _MLA | {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2,
        "use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "mamba_d_state": 8, "mamba_headdim": 16,
        "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8, "layers_block_type": ["mamba",
        "hybrid", "mamba"], "num_mem_blocks": 1, "hybrid_layer_ids": [1],
        "use_mem_eff_path": False, "adapter_rank": 4},
    "xlstm": {"num_heads": 4, "embedding_dim": 32, "num_blocks": 2, "chunk_size": 8},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
}  # fmt: skip
# these do not take BASE's names
_OWN_NAMES = frozenset({"gpt2", "gptj", "codegen", "gpt_bigcode", "openai-gpt"})
# Types that the mapping names and that are not built here.
_DECODER = (
    "the decoder of an encoder-decoder: it needs the encoder's output for its cross attention"
)
_BERT = "an encoder run as a decoder; see the encoder of this name"
_WHOLE = "a model of pictures or sound; its text part has a type of its own"
_LARGE = "no tiny config of it is made here"
NOT_BUILT: dict[str, str] = (
    {"gpt-sw3": "GPT-2 under another name"}
    | dict.fromkeys(
        (
            "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus "
            "plbart prophetnet trocr whisper moshi musicgen musicgen_melody beam "
        ).split(),
        _DECODER,
    )
    | dict.fromkeys(
        (
            "bert bert-generation big_bird camembert data2vec-text electra ernie "
            "megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta "
            "xlm-roberta-xl xmod xlnet reformer "
        ).split(),
        _BERT,
    )
    | dict.fromkeys(
        (
            "fuyu gemma3 gemma3n gemma4 gemma4_unified gemma4_assistant "
            "gemma4_unified_assistant git got_ocr2 llama4 mllama moss_transcribe_diarize "
            "phi4_multimodal emu3 qwen3_5 qwen3_5_moe qwen4_exp dots3_note "
            "cohere_compass_text "
        ).split(),
        _WHOLE,
    )
    | dict.fromkeys(
        (
            "axk1 axk2 blt deepseek_v4 dots3_note_text hy_v4 inkling2_text "
            "inkling2_loop_text kimi_linear lara_mini qwen4_exp_text "
        ).split(),
        _LARGE,
    )
)
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(name: str) -> Any:
    given = MAKERS[name]
    return CONFIG_MAPPING[name](**(given if name in _OWN_NAMES else BASE | given))


def build(name: str, *, attention: str | None = None, seed: int = 0) -> Any:
    """A random instance in eval mode whose weights are spread so that every part matters."""
    made = config(name)
    torch.manual_seed(seed)
    model = (
        MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
        ._from_config(made, attn_implementation=attention)
        .eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, x in model.named_parameters():
            if path.endswith(("A_log", ".D", "dt_bias")):  # a state space's own ranges
                continue
            noise = torch.randn(x.shape, generator=generator).to(x.dtype)
            if x.ndim >= 2:
                x.copy_(noise * 1.2 / x.shape[-1] ** 0.5)
            else:
                x.add_(noise * (0.3 if "norm" in path.lower() or "ln_" in path else 0.1))
        for path, x in model.named_buffers():
            if path.endswith("layer_scalar"):
                x.fill_(0.7)
    return model


@cache
def lm(name: str) -> Any:
    """`build(name)`, wrapped and so proved: one for all tests, which leave it as it was."""
    return wrap(build(name))


def prompts() -> list[list[int]]:
    return [[3, 14, 15, 92, 65, 35, 89, 79, 32], [38, 46, 26, 43, 3]]
