"""A classifier learns classes that the first token tells, and its loss is Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import stratoscope
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.training import classify

EXAMPLE = {
    "fit": lambda case: {"inputs": _labelled(case.rows * 2), "steps": 3, "batch_size": 2},
    "batch": lambda case: {"rows": _labelled(case.rows)},
}


def _labelled(rows: list[list[int]]) -> list[tuple[list[int], int]]:
    return [(row, number % 2) for number, row in enumerate(rows)]


DICE = torch.Generator().manual_seed(0)
ROWS = [
    (
        [1 + number % 3, *torch.randint(4, 30, (3 + number % 4,), generator=DICE).tolist()],
        number % 3,
    )
    for number in range(24)
]


def subject() -> LM:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return stratoscope.wrap(hf.BertForSequenceClassification(config).eval())


@torch.no_grad()
def test_hugging_faces_loss() -> None:
    lm = subject()
    found = classify.loss(lm.model, classify.batch(ROWS, None, DICE))
    alone = [
        lm.model(input_ids=torch.tensor([ids]), labels=torch.tensor([label])).loss.item()
        for ids, label in ROWS
    ]
    assert found["loss"].item() == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    named = classify.batch([{"text": ids, "label": label} for ids, label in ROWS], None, DICE)
    assert classify.loss(lm.model, named)["loss"] == found["loss"]


def test_it_learns(tmp_path: Path) -> None:
    lm = subject()
    folder = classify.fit(
        lm, ROWS, steps=60, rate=3e-3, batch_size=8, held_out=ROWS[:6], folder=tmp_path / "fit"
    )
    assert json.loads((folder / "card.json").read_text())["held_out"]["60"]["accuracy"] == 1.0
    trained = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        said = [int(trained(torch.tensor([ids])).logits.argmax()) for ids, _ in ROWS]
    assert said == [label for _, label in ROWS]


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="class is 3; this model's are 0 to 2"):
        classify.fit(subject(), [*ROWS, ([4, 5], 3)])
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    with pytest.raises(InputError, match="no read-out of classes"):
        classify.fit(stratoscope.wrap(hf.LlamaForCausalLM(config).eval()), ROWS)
