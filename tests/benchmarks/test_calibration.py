"""The calibration error by hand, of a perfect guesser and of a boaster."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope.benchmarks import Item, calibration, likelihood
from stratoscope.errors import InputError

ITEMS = [Item("w1 w2", ("w3", "w4 w5"), 0, id="1"), Item("w5", ("w1", "w2", "w3"), 2, id="2")]


def test_by_hand() -> None:
    said = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.4, 0.6], [0.65, 0.35]])
    truth = torch.tensor([0, 1, 1, 0])
    # 2 bins: all four lie above 1/2; 3 of 4 right, mean confidence 0.775
    assert calibration.expected_error(said, truth, bins=2) == pytest.approx(0.025)
    # 10 bins: {0.95, 0.9}: half right against 0.925; {0.6}, {0.65} in one: right against 0.625
    expected = (2 * abs(0.5 - 0.925) + 2 * abs(1 - 0.625)) / 4
    assert calibration.expected_error(said, truth, bins=10) == pytest.approx(expected)
    # on either side of the edge: 0.45 and wrong, 0.55 and right; in one bin they would cancel
    said, truth = torch.tensor([[0.45, 0.35, 0.2], [0.55, 0.25, 0.2]]), torch.tensor([1, 0])
    assert calibration.expected_error(said, truth, bins=2) == pytest.approx(0.45)


def test_an_honest_guesser_has_none_and_a_boaster_all() -> None:
    generator = torch.Generator().manual_seed(0)
    sure = 0.5 + 0.5 * torch.rand(20_000, generator=generator)
    right = torch.rand(20_000, generator=generator) < sure
    said, truth = torch.stack([sure, 1 - sure], dim=1), (~right).long()
    assert calibration.expected_error(said, truth) < 0.02
    boast = torch.tensor([[1.0, 0.0]]).expand(20_000, 2)
    wrong = (truth == 1).double().mean().item()
    assert calibration.expected_error(boast, truth) == pytest.approx(wrong, abs=1e-6)
    with pytest.raises(InputError, match="0 bins"):
        calibration.expected_error(said, truth, bins=0)


def test_of_a_language_model() -> None:
    torch.manual_seed(0)
    whole = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, 9)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 9}
    lm = stratoscope.wrap(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval(), tokenizer)
    found = calibration.score(lm, ITEMS, bins=1)
    scores = likelihood.score(lm, ITEMS)["score"].values
    sure = [torch.tensor(s[s == s]).softmax(0).max().item() for s in scores]
    assert found.confidence.values.tolist() == pytest.approx(sure, rel=1e-5)
    gap = abs(float(found.right.sum()) - sum(sure)) / 2
    assert float(found.error) == pytest.approx(gap, rel=1e-5)
    with pytest.raises(InputError, match="bins=0"):
        calibration.score(lm, ITEMS, bins=0)
