"""Tiny random encoders of float series: sound waves and time series."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from stratoscope.models import wrap
from support import zoo_encoders

_SOUND = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "vocab_size": 20,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_EACH = {"feat_extract_norm": "layer"}
_STABLE = _EACH | {"do_stable_layer_norm": True}
_SERIES = {
    "num_input_channels": 2, "context_length": 24, "patch_length": 4, "patch_stride": 4,
    "d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 48,
    "prediction_length": 3,
}  # fmt: skip
Maker = Callable[[], tuple[Any, Any]]
SOUND: dict[str, Maker] = {
    "wav2vec2": lambda: (hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config(**_SOUND, **_EACH)),
    "wav2vec2 stable": lambda: (hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config(**_SOUND, **_STABLE)),
    "hubert": lambda: (hf.HubertForCTC, hf.HubertConfig(**_SOUND, **_STABLE)),
}
ALONE: dict[str, Maker] = {
    "wav2vec2 grouped": lambda: (hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config(**_SOUND)),
    "data2vec-audio": lambda: (hf.Data2VecAudioForCTC, hf.Data2VecAudioConfig(**_SOUND)),
}
SERIES: dict[str, Maker] = {
    "patchtst": lambda: (hf.PatchTSTForPrediction, hf.PatchTSTConfig(**_SERIES)),
    "patchtst post-norm": lambda: (
        hf.PatchTSTModel,
        hf.PatchTSTConfig(**_SERIES, pre_norm=False, norm_type="layernorm", use_cls_token=True),
    ),
}
ALL = SOUND | ALONE | SERIES


def model(name: str) -> Any:
    return zoo_encoders.build(ALL[name])


@cache
def lm(name: str) -> Any:
    """A wrapped instance: one for all tests, which leave it as it was."""
    return wrap(model(name))


def inputs(name: str) -> Any:
    generator = torch.Generator().manual_seed(1)
    if name in SERIES:
        return {"past_values": torch.randn(3, 24, 2, generator=generator)}
    lengths = (60, 60, 60) if name in ALONE else (60, 41, 33)
    return [torch.randn(n, generator=generator) for n in lengths]


def arguments(name: str) -> dict[str, Any]:
    """`inputs(name)` as Hugging Face's forward takes them."""
    given = inputs(name)
    if name in SERIES:
        return given
    table = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
    if name in ALONE:
        return {"input_values": table}
    mask = torch.arange(60) < torch.tensor([len(x) for x in given])[:, None]
    return {"input_values": table, "attention_mask": mask.long()}
