"""Tiny random-config instances of every architecture, and inputs for them: the subjects of the
family tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from stratoscope.models import wrap

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 90  # id of the image token in the vision-language models


def _clip() -> dict[str, Any]:
    return {"text_config": SMALL | {"max_position_embeddings": 32}, "vision_config": VISION}


def _qwen_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
    }
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }
    return hf.Qwen2_5_VLConfig(
        text_config=GROUPED | {"rope_parameters": rope}, vision_config=vision, **ids
    )


def _sliding(**more: Any) -> dict[str, Any]:
    return GROUPED | {"head_dim": 8, "sliding_window": 4} | more


CONFIGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "smollm2": lambda: (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, rope_theta=1e5),
    ),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**_sliding())),
    "qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": lambda: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(
            **_sliding(
                query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=1.0
            )
        ),
    ),
    "gemma3": lambda: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**_sliding(query_pre_attn_scalar=8)),
    ),
    "phi3": lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED)),
    "olmo2": lambda: (hf.Olmo2ForCausalLM, hf.Olmo2Config(**GROUPED)),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt_neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SMALL)),
    "gpt_neox_sequential": lambda: (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**SMALL, use_parallel_residual=False),
    ),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=96,
            word_embed_proj_dim=32,
        ),
    ),
    "bloom": lambda: (
        hf.BloomForCausalLM,
        hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=96),
    ),
    "mixtral": lambda: (hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "bert": lambda: (hf.BertForMaskedLM, hf.BertConfig(**SMALL)),
    "bert_base": lambda: (hf.BertModel, hf.BertConfig(**SMALL)),
    "roberta": lambda: (hf.RobertaForMaskedLM, hf.RobertaConfig(**SMALL)),
    "distilbert": lambda: (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=96),
    ),
    "modernbert": lambda: (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(
            **SMALL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4
        ),
    ),
    "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**VISION, num_labels=5)),
    "clip": lambda: (hf.CLIPModel, hf.CLIPConfig(**_clip())),
    "siglip": lambda: (hf.SiglipModel, hf.SiglipConfig(**_clip())),
    "llava": lambda: (
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**GROUPED),
            image_token_id=IMAGE,
        ),
    ),
    "idefics3": lambda: (
        hf.Idefics3ForConditionalGeneration,
        hf.Idefics3Config(
            text_config=hf.LlamaConfig(**GROUPED),
            vision_config=VISION | {"patch_size": 4},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
    ),
    "smolvlm": lambda: (
        hf.SmolVLMForConditionalGeneration,
        hf.SmolVLMConfig(
            text_config=hf.LlamaConfig(**GROUPED),
            vision_config=VISION | {"patch_size": 4},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
    ),
    "qwen2_5_vl": lambda: (hf.Qwen2_5_VLForConditionalGeneration, _qwen_vl()),
}
DECODERS = tuple(CONFIGS)[:15]
ENCODERS = ("bert", "bert_base", "roberta", "distilbert", "modernbert")
VLMS = ("llava", "idefics3", "smolvlm", "qwen2_5_vl")


def model(name: str, seed: int = 0) -> Any:
    """A random instance in eval mode; weights and biases are spread so that every norm and bias
    matters."""
    kind, config = CONFIGS[name]()
    torch.manual_seed(seed)
    made = kind(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return made


def inputs(name: str) -> Any:
    """Two examples of different length, or, where images take part, one example with an image."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    text = [3, 4, 5, 6, 7, 8]
    if name == "vit":
        return {"pixel_values": pixels}
    if name in ("clip", "siglip"):
        return {"input_ids": torch.tensor([[*text, 2]]), "pixel_values": pixels}
    if name == "llava":
        return {"input_ids": torch.tensor([[1, *[IMAGE] * 4, *text]]), "pixel_values": pixels}
    if name in ("idefics3", "smolvlm"):
        return {
            "input_ids": torch.tensor([[1, *[IMAGE] * 4, *text]]),
            "pixel_values": pixels[:, None],
        }
    if name == "qwen2_5_vl":
        patches = torch.randn(64, 3 * 2 * 4 * 4, generator=generator)
        ids = torch.tensor([[1, 92, *[IMAGE] * 16, 93, *text]])
        return {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 8, 8]]),
        }
    return [[3, 14, 15, 92, 65, 35, 89, 79, 32], [38, 46, 26, 43, 3]]


@cache
def lm(name: str) -> Any:
    """`model(name)`, wrapped: one for all tests, which leave it as it was."""
    return wrap(model(name))


def tokenizer(words: list[str]) -> Any:
    """Whole words split at white space; the id of each is its place in the list."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=words[-1])


def byte_level() -> Any:
    """Every byte is a token, and so are " the" and the first two bytes of a euro sign."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(alphabet)}
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("â", "Ĥ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def arguments(name: str) -> dict[str, Any]:
    """`inputs(name)` as Hugging Face's forward takes them: right-padded, with a mask."""
    given = inputs(name)
    if isinstance(given, dict):
        return dict(given)
    width = max(map(len, given))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in given])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[i < len(r) for i in range(width)] for r in given]).long(),
    }


def gap(got: Any, expected: Any) -> float:
    """The worse of two errors: largest difference over the largest value, and relative norm. NaN
    counts as infinite."""
    got, expected = (torch.as_tensor(x).detach().double() for x in (got, expected))
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = got - expected
    absolute = difference.abs().max() / expected.abs().max().clamp_min(1e-9)
    relative = difference.norm() / expected.norm().clamp_min(1e-9)
    worst = float(torch.stack([absolute, relative]).max())
    return worst if worst == worst else float("inf")
