"""A masked language model is explained at its mask: what the page draws is the model's own answer
there, checked with plain transformers."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stratoscope.models import wrap
from stratoscope.report import page
from stratoscope.report.explain import STEPS, explain
from stratoscope.report.explanation import Explanation
from support import tiny

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(4, 96))]
PROMPT, ROW, AT = "w9 w14 [MASK] w15 w92", [1, 9, 14, 3, 15, 92, 2], 3


@pytest.fixture(scope="module")
def asked() -> tuple[Any, Explanation]:
    inside = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[PAD]"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    inside.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "cls", "sep", "mask")}
    lm = wrap(tiny.model("bert"), PreTrainedTokenizerFast(tokenizer_object=inside, **named))
    rest = [step for step in STEPS[1:] if step != "layers.logit_lens"]
    return lm, explain(lm, PROMPT, skip=rest)


def line(html: str, title: str) -> np.ndarray:
    """What the figure of this title draws upwards."""
    figure = html[html.index(f"<figcaption>{title}") :]
    found = re.search(r'<script type="application/json">(.*?)</script>', figure)
    assert found
    y = json.loads(found[1])["data"][0]["y"]
    return np.frombuffer(base64.b64decode(y["bdata"]), dtype=y["dtype"])


def test_rank_and_probability_are_those_at_the_mask(asked: tuple[Any, Explanation]) -> None:
    lm, found = asked
    html = page.render(found)
    with torch.no_grad():
        logits = lm.model(torch.tensor([ROW])).logits[0]
    answer = WORDS.index(found.answer)
    assert answer == int(logits[AT].argmax())
    assert int(logits[-1].argmax()) != answer  # else the last position would do as well
    assert line(html, f"Rank of the answer at the mask, token {AT}")[-1] == 1
    chance = line(html, f"Probability of the answer at the mask, token {AT}")[-1]
    np.testing.assert_allclose(chance, float(logits[AT].softmax(-1)[answer]), rtol=1e-4)
    assert found.results["layers.logit_lens"]["read_at"].values.tolist() == [AT]


def test_the_headline_says_at_the_mask_and_fills_it(asked: tuple[Any, Explanation]) -> None:
    _, found = asked
    html = page.render(found)
    assert "Why this token at the mask?" in html
    assert f"w9 w14 <mark>{found.answer}</mark> w15 w92</h1>" in html
    assert "next tokens" not in html


def test_a_next_token_is_no_mask(make) -> None:
    html = page.render(make())
    assert "Why this next token?" in html
    assert "Rank of the answer at the last token" in html
    assert "at the mask" not in html
