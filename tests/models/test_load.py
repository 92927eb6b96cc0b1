"""Loading a folder: the same model, the right class, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, LlamaForCausalLM

from stratoscope.errors import FamilyError, LoadError
from stratoscope.lab import planted
from stratoscope.models import load
from stratoscope.models.prove import prove
from support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planted")
    p = planted.induction()
    p.model.save_pretrained(place)
    p.tokenizer.save_pretrained(place)
    return place


def test_a_folder_loads_as_the_same_model(folder: Path) -> None:
    p = planted.induction()
    lm = load(folder)
    assert isinstance(lm.model, LlamaForCausalLM)
    assert not lm.model.training
    assert lm.model.dtype == torch.float32
    ids = p.tokenizer(p.clean, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tiny.gap(lm(p.clean)["logits"], p.model(ids).logits) == 0
    assert lm.provenance["model"] == str(folder)
    assert lm.provenance["weights"].startswith("sha256:")


def test_precision(folder: Path) -> None:
    lm = load(folder, dtype="bfloat16")
    assert lm.model.dtype == torch.bfloat16
    assert lm.provenance["dtype"] == "bfloat16"
    with pytest.raises(LoadError, match="'int4': choose float32"):
        load(folder, dtype="int4")


def test_an_encoder_keeps_its_read_out(tmp_path: Path) -> None:
    tiny.model("bert").save_pretrained(tmp_path)
    lm = load(tmp_path, tokenizer=False)
    assert isinstance(lm.model, BertForMaskedLM)
    with torch.no_grad():
        assert (
            tiny.gap(
                lm(tiny.inputs("bert"))["logits"], tiny.lm("bert")(tiny.inputs("bert"))["logits"]
            )
            == 0
        )


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="tokenizer=False"):
        load(tmp_path)
    lm = load(tmp_path, tokenizer=False)
    assert lm.tokenizer is None
    assert tiny.gap(lm([[3, 4]])["logits"], tiny.lm("llama")([[3, 4]])["logits"]) == 0


def test_a_folder_that_is_not_there_or_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{broken")
    with pytest.raises(LoadError):
        load(tmp_path / "empty")


def test_an_unhandled_config_is_refused_when_loaded(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.config.pretraining_tp = 4
    model.save_pretrained(tmp_path)
    with pytest.raises(FamilyError, match="`pretraining_tp` = 4"):
        load(tmp_path, tokenizer=False)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_the_real_models_hold_every_invariant(name: str) -> None:
    lm = load(name)
    found = prove(lm, ["The capital of France is", "Two roads diverged in a yellow wood, and"])
    assert len(found) >= 5 * lm.dims.layers
    assert max(check.relative for check in found) < 1e-5
