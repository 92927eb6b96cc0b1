"""`merge` writes the folder that `editing.merge` writes and prints what each model scores before
and after; what cannot be done is said before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import stratoscope
from stratoscope import cli
from stratoscope.editing import merge
from stratoscope.models import LM
from stratoscope.tokens import perplexity
from support.merging import FIRST, SECOND, rows, saved, tensors, three

# whole models are opened again and again; types are checked where `merge` is tested
pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM, LM]:
    return three()


@pytest.fixture(scope="module")
def place(models: tuple[LM, LM, LM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merge")
    for name, lm in zip(("base", "first", "second"), models):
        saved(lm, place / name)
    for name, pair in (("first", FIRST), ("second", SECOND)):
        said = [[f"w{i}" for i in row] for row in rows(pair, 99, 8)]
        (place / f"{name}.txt").write_text("\n".join(" ".join(row[-2:]) for row in said))
        items = [{"context": " ".join(row[:-1]), "choices": [row[-1], "w30"], "gold": 0}
                 for row in said]  # fmt: skip
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return place


def run(place: Path, *words: Any) -> tuple[int, str]:
    given = ["merge", "--base", place / "base", "--models", place / "first", place / "second"]
    done = CliRunner().invoke(cli.main, [str(word) for word in (*given, *words)])
    return done.exit_code, done.output


def test_scores_before_and_after_are_printed(
    place: Path, models: tuple[LM, LM, LM], tmp_path: Path
) -> None:
    code, said = run(
        place, "--method", "ties", "--density", 0.5, "--texts", place / "first.txt",
        place / "second.txt", "--items", place / "first.jsonl", place / "second.jsonl",
        "--weights", 1, 1.5, "--scale", 1.6, "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, said
    assert "Merging 2 models by ties: 0 MB" in said
    expected = merge.write(
        place / "base", [place / "first", place / "second"], tmp_path / "ours",
        density=0.5, weights=[1.0, 1.5], scale=1.6,
    )  # fmt: skip
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], x) for name, x in tensors(expected).items())
    lines = said.splitlines()
    texts = lines.index("perplexity on its texts: the base, the model, merged")
    items = lines.index("share of its items right: the base, the model, merged")
    numbers = [line.split()[1:] for line in lines[texts + 1 : texts + 3]]
    merged = stratoscope.load(tmp_path / "out")
    for name, own, row in zip(("first", "second"), models[1:], numbers):
        asked = (place / f"{name}.txt").read_text().splitlines()
        ids = [[int(word[1:]) for word in line.split()] for line in asked]
        for lm, number in zip((models[0], own, merged), row):
            measured = perplexity.perplexity(perplexity.measure(lm, ids))
            assert float(number) == pytest.approx(measured, abs=2e-3)
        assert float(row[2]) < float(row[0])
    for line in lines[items + 1 : items + 3]:
        assert line.split()[2:] == ["100.0%", "100.0%"]


def test_without_texts_only_the_folder(place: Path, tmp_path: Path) -> None:
    code, said = run(place, "--method", "linear", "--out", tmp_path / "out")
    assert code == 0, said
    assert said.splitlines()[-1] == f"Saved to {tmp_path / 'out'}"


def test_an_adapter_is_a_model_too(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    lora, path = tmp_path / "lora", "base_model.model.model.layers.0.mlp.up_proj"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4, "r": 1}')
    halves = {
        f"{path}.lora_A.weight": torch.ones(1, 32),
        f"{path}.lora_B.weight": torch.ones(48, 1),
    }
    save_file(halves, lora / "adapter_model.safetensors")
    code, said = run(place, "--models", lora, "--weights", 0, 0, -0.5, "--method",
                     "task_arithmetic", "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, said
    start = tensors(place / "base")
    for name, x in tensors(tmp_path / "out").items():
        moved = -2.0 if name == "model.layers.0.mlp.up_proj.weight" else 0.0
        assert torch.allclose(x, start[name] + moved, atol=1e-6)


def test_what_cannot_be_done_is_said_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (bad := tmp_path / "bad.txt").write_text("w3\n")
    for words, said in (
        (("--out", tmp_path / "full"), "full is there already: give another folder"),
        (("--out", tmp_path / "out", "--density", 0), "density=0"),
        (("--out", tmp_path / "out", "--method", "best"), "method='best': choose one of"),
        (("--out", tmp_path / "out", "--weights", 1), "2 models, 1 weights"),
        (("--out", tmp_path / "out", "--texts", *[bad] * 3), "2 models and 3 files of --texts"),
        (("--out", tmp_path / "out", "--texts", bad), "have one token"),
    ):
        code, text = run(place, *words)
        assert code == 2, text
        assert said in " ".join(text.split())
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
