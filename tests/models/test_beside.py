"""What stands beside the tokens is honoured as plain transformers has it, or refused with a
sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stratoscope.engine.intervene import add, intervene, knock_out
from stratoscope.engine.metric import last_logits, target
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models import wrap
from stratoscope.models.batch import make
from stratoscope.tokens import next_token
from support import tiny

ROWS = [[3, 14, 15, 92, 65], [38, 46, 26]]
LEFT = {
    "input_ids": torch.tensor([[3, 14, 15, 92, 65], [0, 0, 38, 46, 26]]),
    "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]),
}


def alone(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("left", [True, False])
def test_embeddings_keep_their_mask(name: str, left: bool) -> None:
    """A padded row of embeddings gives what its tokens alone give; -1 is its last real position."""
    lm = tiny.lm(name)
    order = [0, 1] if left else [1, 0]
    ids = LEFT["input_ids"] if left else torch.tensor([[3, 14, 15, 92, 65], [38, 46, 26, 0, 0]])
    mask = LEFT["attention_mask"] if left else torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    # padding is loud
    embeds = lm.model.get_input_embeddings()(ids).detach() + 3 * (1 - mask[..., None])
    given = {"inputs_embeds": embeds[order], "attention_mask": mask[order]}
    with torch.no_grad():
        got = lm(given)["logits"]
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    seen = capture(lm, given, last, positions=-1)[last]
    for row, example in enumerate(order):
        ids_alone = ROWS[example]
        assert tiny.gap(got[row, : len(ids_alone)], alone(lm.model, ids_alone)) < 1e-5
        assert tiny.gap(seen[row], capture(lm, [ids_alone], last)[last][0, -1]) < 1e-5
    change = [add("layers.1.mlp.out", torch.linspace(-1, 1, 32), positions=-2)]
    metric = lambda logits, example: logits[:, 5] - logits[:, 7]  # noqa: E731
    swept, by_ids = (
        sweep(lm, given, [change], metric),
        naive(lm, [ROWS[e] for e in order], [change], metric),
    )
    assert tiny.gap(swept, by_ids) < 1e-4


def test_labels_move_with_their_tokens() -> None:
    """The mean over the tokens that follow a real one. Plain transformers, padded left, also counts
    what a padding position says of the first token: its own right-padded run is the reference."""
    lm = tiny.lm("llama")
    labels = LEFT["input_ids"].masked_fill(LEFT["attention_mask"] == 0, -100)
    right = {
        "input_ids": torch.tensor([ROWS[0], [*ROWS[1], 0, 0]]),
        "attention_mask": LEFT["attention_mask"].flip(1),
    }
    own = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = lm({**LEFT, "labels": labels})["loss"]
        true = lm.model(**right, labels=own).loss
    assert float(loss) == pytest.approx(float(true), rel=1e-5)


def test_labels_of_whole_texts_stay() -> None:
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**tiny.SMALL, num_labels=5)).eval()
    with torch.no_grad():
        got = wrap(model)({**LEFT, "labels": torch.tensor([4, 1])})["loss"]
        right = {
            "input_ids": torch.tensor([ROWS[0], [*ROWS[1], 0, 0]]),
            "attention_mask": LEFT["attention_mask"].flip(1),
        }
        true = model(**right, labels=torch.tensor([4, 1])).loss
    assert float(got) == pytest.approx(float(true), rel=1e-5)


HOLE = {"input_ids": [[3, 9, 14, 15, 6]], "attention_mask": [[0, 1, 1, 0, 1]]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hole": (HOLE, r"hides position 3 of prompt 0.*knock_out\('\*', None, 2\)"),
    "hole beside embeddings": (
        {"inputs_embeds": torch.randn(1, 5, 32), "attention_mask": HOLE["attention_mask"]},
        "hides position 3",
    ),
    "4-D mask": (
        {"input_ids": [[3, 9]], "attention_mask": torch.zeros(1, 1, 2, 2)},
        r"\(1, 1\) is not one 0 or 1",
    ),
    "additive mask": (
        {"input_ids": [[3, 9]], "attention_mask": [[0.0, -1e9]]},
        "is not one 0 or 1",
    ),
    "cache": (
        {"input_ids": [[3, 9]], "past_key_values": hf.DynamicCache()},
        "goes on from a cache",
    ),
    "option": ({"input_ids": [[3, 9]], "use_cache": True}, r"lm\(inputs, use_cache=True\)"),
    "thing": ({"input_ids": [[3, 9]], "token_type_ids": object()}, "token_type_ids"),
    "no real embedding": (
        {"inputs_embeds": torch.randn(1, 2, 32), "attention_mask": [[0, 0]]},
        "at least one 1",
    ),
    "embeddings of ids": (
        {"inputs_embeds": torch.ones(1, 2).long()},
        r"\(example, position, dim\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused(what: str) -> None:
    inputs, told = REFUSED[what]
    with pytest.raises(InputError, match=told):
        tiny.lm("llama").batch(inputs)


def test_the_advice_about_a_hole_is_what_transformers_does() -> None:
    """knock_out('*', None, position) keeps the numbering, as the mask would."""
    lm, ids = tiny.lm("llama"), [[9, 14, 15, 6]]
    with torch.no_grad():
        true = lm.model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor([[1, 1, 0, 1]])
        ).logits[0, -1]
        with intervene(lm, knock_out("*", None, 2)):
            got = lm(ids)["logits"][0, -1]
    assert tiny.gap(got, true) < 1e-5


def test_padding_is_no_image() -> None:
    batch = make([[5, 90, 6], [90]], None, limit=None, pad=90, image=90)
    assert batch.image.tolist() == [[False, True, False], [True, False, False]]


def words(single: str) -> PreTrainedTokenizerFast:
    listed = ["<s>", "</s>", "<u>", "<mask>", "a", "b", "c"]
    raw = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token="<u>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<u>",
        mask_token="<mask>",
    )


@pytest.mark.parametrize(
    ("single", "text", "ids", "told"),
    [
        ("<s> $A", "a b", [0, 4, 5], None),
        ("<s> $A", "<s> a b", [0, 4, 5], "begins with '<s>'"),
        ("$A", "<s> <s> a", [0, 0, 4], None),  # the user's own two
        ("$A </s>", "a b", [4, 5], "'</s>' after the text was left out"),
        ("$A </s>", "a </s>", [4, 1, 1], None),  # the user's own end: nothing is taken away
        ("<s> $A </s>", "<s> a", [0, 4], "left out"),
    ],
)
def test_what_the_tokenizer_adds(single: str, text: str, ids: list[int], told: str | None) -> None:
    lm = wrap(tiny.model("llama"), words(single))
    batch = lm.batch(text)
    assert batch.ids.tolist() == [ids]
    assert (told is None and batch.notes == ()) or told in " ".join(batch.notes)
    assert set(batch.notes) <= set(target(lm, batch).notes)
    assert tiny.gap(last_logits(lm, text)[0], alone(lm.model, ids)[-1]) < 1e-5


def test_an_encoder_keeps_its_end() -> None:
    lm = wrap(tiny.model("bert"), words("<s> $A </s>"))
    assert lm.batch("a b").ids.tolist() == [[0, 4, 5, 1]]
    assert (
        "fills in masked tokens; its prediction is read at the last token of each prompt ('</s>')"
        in (next_token.measure(lm, "a b", answer="a", foil="b").attrs["notes"])
    )
    asked = lm.batch("a <mask> b")  # read at the mask: nothing to say
    assert next_token.measure(lm, asked, answer="a", foil="b").attrs["notes"] == ""
    place = int((asked.ids[0] == lm.tokenizer.mask_token_id).nonzero())
    assert tiny.gap(last_logits(lm, asked)[0], alone(lm.model, asked.ids[0].tolist())[place]) < 1e-5
    headless = wrap(tiny.model("bert_base"), words("<s> $A </s>"))
    assert headless.batch("a b").ids.tolist() == [[0, 4, 5, 1]]
