"""Answers that need no understanding, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope.benchmarks import Item, controls, likelihood

ITEMS = [
    Item("w1 w2", ("w3", "w4 w5"), 0, id="1"),
    Item("w2 w2", ("w3 w3 w3", "w4"), 0, id="2"),
    Item("w1 w1", ("w6", "w3", "w7 w1"), 1, id="3"),
    Item("w5", ("w1", "w2", "w3", "w4"), 2, id="4"),
]


def test_every_control_by_hand() -> None:
    found = controls.score(None, ITEMS)
    accuracy = dict(zip(found["control"].to_numpy().tolist(), found["accuracy"].to_numpy()))
    assert accuracy == pytest.approx(
        {
            "oracle": 1.0,
            "chance": (1 / 2 + 1 / 2 + 1 / 3 + 1 / 4) / 4,
            "position": 0.5,  # the first
            "majority": (1 + 1 / 2 + 1 + 1) / 4,  # "w3", which item 2 does not offer
            "longest": (0 + 1 + 0 + 1 / 4) / 4,
        }
    )


def test_blind_is_the_model_without_contexts() -> None:
    torch.manual_seed(0)
    whole = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, 9)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")
    config = hf.LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lm = stratoscope.wrap(hf.LlamaForCausalLM(config).eval(), tokenizer)
    found = controls.score(lm, ITEMS)
    bare = [Item("", item.choices, item.gold) for item in ITEMS]
    expected = likelihood.score(lm, bare)["right"]
    np.testing.assert_array_equal(found["right"].sel(control="blind"), expected)
    elsewhere = [Item("w8 w8", item.choices, item.gold) for item in ITEMS]
    again = controls.score(lm, elsewhere)["right"].sel(control="blind")
    np.testing.assert_array_equal(again, expected)


def test_the_commonest_answer_is_one_answer() -> None:
    """Where every right text is another, it is right once and else chance: an item's own gold does
    not tell."""
    items = [Item(f"c{i}", (f"a{i}", f"b{i}"), i % 2) for i in range(10)]
    found = controls.score(None, items)["accuracy"]
    assert float(found.sel(control="majority")) == (1 + 9 / 2) / 10
