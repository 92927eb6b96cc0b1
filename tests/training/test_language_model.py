"""Next-token loss against Hugging Face's, padded and packed; the fit of a copy; and Transformers'
Trainer made of the same two functions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import stratoscope
from stratoscope.engine import objective, train
from stratoscope.errors import InputError, ResultError, SiteError
from stratoscope.models.lm import LM
from stratoscope.training import language_model

EXAMPLE = {
    "fit": lambda case: {"inputs": case.rows * 2, "steps": 3, "batch_size": 2},
    "batch": lambda case: {"rows": case.rows},
}

DICE = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(1, 60, (n,), generator=DICE).tolist() for n in (5, 9, 3, 12, 7, 4, 15, 6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))


def llama() -> LM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=64,
    )
    return stratoscope.wrap(hf.LlamaForCausalLM(config).eval())


def gpt2() -> LM:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return stratoscope.wrap(hf.GPT2LMHeadModel(config).eval())


def loss_of(lm: LM, rows: Any, tokenizer: Any = None) -> tuple[float, int]:
    found = language_model.loss(lm.model, language_model.batch(rows, tokenizer, DICE))
    return found["loss"].item(), int(found["targets"])


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_hugging_faces_loss_whatever_shares_a_row(make: Any) -> None:
    """Alone, beside padding, and packed with other texts: the same mean over the same targets."""
    lm = make()
    alone = [
        lm.model(input_ids=ids, labels=ids).loss.item()
        for ids in (torch.tensor([text]) for text in TEXTS)
    ]
    targets = [len(text) - 1 for text in TEXTS]
    expected = sum(a * n for a, n in zip(alone, targets)) / sum(targets)
    assert loss_of(lm, TEXTS) == (pytest.approx(expected, abs=1e-5), sum(targets))
    rows = language_model.packed(TEXTS, None, 64)
    assert [len(row) for row in rows] == [8]
    assert loss_of(lm, rows) == (pytest.approx(expected, abs=1e-5), sum(targets))


def test_packing_loses_no_token_and_fills_its_rows() -> None:
    """Cut where a row is full; only a rest of one token, which is no target, is left out."""
    rows = language_model.packed(TEXTS, None, 10)
    assert {sum(map(len, row)) for row in rows[:-1]} <= {9, 10}
    assert sum(map(len, [t for row in rows for t in row])) >= sum(map(len, TEXTS)) - len(TEXTS)
    assert all(len(text) > 1 for row in rows for text in row)
    assert [i for text in language_model.packed(TEXTS, None, 99)[0] for i in text] == sum(TEXTS, [])  # noqa: RUF017


@torch.no_grad()
def test_a_target_is_not_shown() -> None:
    """Another label changes the loss and no logit; another token changes logits from it on."""
    lm = llama()
    batch = language_model.batch(TEXTS[:2], None, DICE)
    shown = {name: x for name, x in batch.items() if name != "labels"}
    before, logits = language_model.loss(lm.model, batch)["loss"], lm.model(**shown).logits
    batch["labels"][0, 3] = (batch["labels"][0, 3] + 1) % 60
    assert language_model.loss(lm.model, batch)["loss"] != before
    assert torch.equal(lm.model(**shown).logits, logits)
    shown["input_ids"][0, 3] = (shown["input_ids"][0, 3] + 1) % 60
    changed = lm.model(**shown).logits != logits
    assert not changed[0, :3].any()
    assert changed[0, 3].all()


def test_the_side_of_padding_does_not_matter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 60)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{i}" for i in ids) for ids in TEXTS]
    lm = llama()
    for side in ("left", "right"):
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=whole, pad_token="<pad>", padding_side=side
        )
        assert loss_of(lm, [{"text": text} for text in texts], tokenizer) == loss_of(lm, TEXTS)


def test_fit_gives_a_folder_and_leaves_the_model(tmp_path: Path) -> None:
    lm = llama()
    before = copy.deepcopy(lm.model.state_dict())
    state = torch.get_rng_state()
    options: dict[str, Any] = {"steps": 12, "rate": 1e-2, "batch_size": 4, "checkpoints": (5,)}
    folder = language_model.fit(lm, TEXTS, held_out=TEXTS[:3], folder=tmp_path / "a", **options)
    assert all(torch.equal(x, before[name]) for name, x in lm.model.state_dict().items())
    assert not lm.model.training
    assert torch.equal(state, torch.get_rng_state())
    card = json.loads((folder / "card.json").read_text())
    assert card["curve"][-1][1] < card["curve"][0][1]
    trained = stratoscope.load(folder, tokenizer=False)
    loss, targets = loss_of(trained, TEXTS[:3])
    assert card["held_out"]["12"] == {"loss": pytest.approx(loss, abs=1e-4), "targets": targets}
    assert (
        loss_of(stratoscope.load(folder / "checkpoints" / "step-5", tokenizer=False), TEXTS[:3])[0]
        > loss
    )
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = language_model.fit(lm, TEXTS, held_out=TEXTS[:3], folder=tmp_path / "a", **options)
    assert (again / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ResultError, match="holds something else"):
        language_model.fit(lm, TEXTS[1:], folder=folder, **options)


def test_a_fit_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after 7 of 12 steps: the same call ends in the same bits, in the same folder."""
    lm = llama()
    options: dict[str, Any] = {"steps": 12, "rate": 1e-2, "batch_size": 4}
    fitted = language_model.fit(lm, TEXTS, **options)
    whole = fitted.rename(fitted.with_name("whole"))
    expected = stratoscope.load(whole, tokenizer=False).model.state_dict()

    class Clock(train._Clock):
        def read(self) -> float:
            return 31.0

    steps: list[int] = []
    loss = language_model.loss

    def stopping(model: Any, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return loss(model, batch)

    monkeypatch.setattr(train, "_Clock", Clock)
    monkeypatch.setattr(language_model, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        language_model.fit(lm, TEXTS, **options)
    resumed = stratoscope.load(
        language_model.fit(lm, TEXTS, **options), tokenizer=False
    ).model.state_dict()
    assert len(steps) == 8 + 5
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_twenty_steps_of_the_trainer(tmp_path: Path) -> None:
    """Transformers' own loop, made of the same two functions, loses what ours loses."""
    lm = llama()
    folder = language_model.fit(lm, TEXTS, steps=20, rate=3e-3, batch_size=3, seed=5)
    ours = [loss for _, loss in json.loads((folder / "card.json").read_text())["curve"]]
    arguments = hf.TrainingArguments(
        str(tmp_path),
        max_steps=20,
        learning_rate=3e-3,
        seed=5,
        per_device_train_batch_size=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    before = copy.deepcopy(lm.model.state_dict())
    trainer = objective.as_trainer(language_model, lm, TEXTS, arguments)
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == 20
    assert theirs == pytest.approx(ours, abs=1e-5)
    ready = stratoscope.load(folder, tokenizer=False).model.state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, ready[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in lm.model.state_dict().items())


def test_what_is_refused(tmp_path: Path) -> None:
    lm = llama()
    with pytest.raises(InputError, match="1 tokens: two at least"):
        language_model.fit(lm, [[3]], steps=1, batch_size=1)
    with pytest.raises(InputError, match="out of 8"):
        language_model.fit(lm, TEXTS, steps=1, batch_size=9)
    with pytest.raises(InputError, match="lower the rate"):
        language_model.fit(lm, TEXTS, steps=60, rate=1e30, batch_size=4, folder=tmp_path / "x")
    bert = hf.BertModel(hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(SiteError, match="does not predict the next token"):
        language_model.fit(stratoscope.wrap(bert.eval()), TEXTS)
