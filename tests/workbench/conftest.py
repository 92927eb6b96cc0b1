"""A workbench of planted models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.workbench.app import create
from stratoscope.workbench.desk import Desk
from support import tiny
from support.asgi import PORT, TOKEN


def opened(name: str) -> Any:
    if name == "of_any_text":
        return of_any_text()
    truth = getattr(planted, name)()
    return wrap(truth.model, truth.tokenizer)


def of_any_text() -> Any:
    """A random model whose tokens are bytes: it reads whatever is typed."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = hf.LlamaConfig(**tiny.SMALL | {"vocab_size": 256, "bos_token_id": None})
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!")
    return wrap(hf.LlamaForCausalLM(config).eval(), fast)


@pytest.fixture
def desk() -> Desk:
    truth = planted.fact_lookup()
    return Desk(["fact_lookup", "of_any_text"], opened, [truth.clean])


@pytest.fixture(scope="session")
def any_text() -> Any:
    return of_any_text()


@pytest.fixture
def app(desk, tmp_path):
    return create(desk, tmp_path, token=TOKEN, port=PORT)
