"""`steer fit`, `grid` and `apply` on a tiny model's folder, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope import cli
from stratoscope.editing import control_vectors, steer
from stratoscope.engine.metric import last_logits
from stratoscope.results import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    config = hf.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf.LlamaForCausalLM(config).save_pretrained(place)
    whole = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, 30)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", pad_token="<s>"
    ).save_pretrained(place)
    return place


def run(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(cli.main, ["steer", *(str(word) for word in words)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def vectors(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vectors")
    rows = [{"positive": f"w{n} w3 w4", "negative": f"w{n} w3 w5"} for n in range(6, 12)]
    (pairs := place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, said = run("fit", "--model", folder, "--pairs", pairs, "--out", place / "fit")
    assert code == 0, said
    assert "layers.2.resid_post: norm" in said
    assert "100% of the pairs agree" in said
    return place / "fit"


def test_a_grid_says_a_line_for_each_layer(folder: Path, vectors: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "asked.txt").write_text("w1 w2\nw3\nw4 w5 w6\nw7 w2\nw9\n")
    given = ("grid", "--model", folder, "--vectors", vectors, "--prompts", prompts)
    given += ("--strength", -1, "--strength", 2, "--answer", "w4", "--draws", 1)
    out = tmp_path / "grid.nc"
    code, said = run(*given, "--foil", "w5", "--texts", prompts.with_name("t.txt"), "--out", out)
    assert code == 2
    assert "cannot be read" in said
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4\nw8 w9\n")
    code, said = run(*given, "--foil", "w5", "--texts", tmp_path / "t.txt", "--out", out)
    assert code == 0, said
    assert "0: " in said
    assert "x at strength 2" in said
    kept = load(out)
    assert kept.effect.shape == (3, 2, 5)
    lm = stratoscope.load(str(folder))
    with steer.edit(lm, vectors, layers=1, strength=2.0):
        inside = last_logits(lm, "w3")[0]
    plain = last_logits(lm, "w3")[0]
    moved = float((inside - plain)[4] - (inside - plain)[5])
    assert float(kept.effect.sel(layer=1, strength=2.0)[1]) == pytest.approx(moved, abs=1e-5)
    code, said = run(*given, "--layer", 1, "--last")
    assert code == 0, said
    assert "1: " in said
    assert "2: " not in said


def test_apply_shows_both_and_keeps_the_edit(folder: Path, vectors: Path, tmp_path: Path) -> None:
    given = ("apply", "--model", folder, "--vectors", vectors, "--layer", 1, "--strength", 40.0)
    code, said = run(
        *given, "--prompt", "w1 w2", "--tokens", 3, "--out", tmp_path / "e.safetensors"
    )
    assert code == 0, said
    before, after = said.partition("steered : ")[::2]
    assert before.removeprefix("as it is: ").strip() != after.partition(" Saved")[0].strip()
    lm = stratoscope.load(str(folder))
    with steer.edit(lm, vectors, layers=1, strength=40.0):
        expected = last_logits(lm, "w1 w2")
    with steer.Steer.load(lm, tmp_path / "e.safetensors"):
        assert torch.equal(last_logits(lm, "w1 w2"), expected)
    for name in ("v.gguf", "v.pt"):
        code, said = run(*given, "--out", tmp_path / name)
        assert code == 0, said
        code, said = run("apply", "--model", folder, "--vectors", tmp_path / name, "--prompt", "w1")
        assert code == 0, said
    found = control_vectors.read_gguf(tmp_path / "v.gguf", lm)
    with steer.edit(lm, found):
        assert torch.allclose(last_logits(lm, "w1 w2"), expected, atol=1e-5)


def test_what_cannot_be_done_is_said_in_a_line(folder: Path, vectors: Path, tmp_path: Path) -> None:
    given = ("apply", "--model", folder, "--vectors", vectors)
    for more, said in (
        ((), "nothing to do"),
        (("--prompt", "w1"), "no layer was named"),
        (("--prompt", "w1", "--layer", 1, "--strength", 1e30), "strength 1e+30 at `layers.1.resid"),
        (("--keep-norm", "--out", tmp_path / "v.gguf"), "not that norms are kept"),
    ):
        code, text = run(*given, *more)
        assert code == 2
        assert said in text
    (tmp_path / "pairs.jsonl").write_text('{"positive": "w1"}\n')
    code, text = run(
        "fit", "--model", folder, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "f"
    )
    assert code == 2
    assert "pair 0 is" in text
    assert not (tmp_path / "f").exists()
