"""`fit`, `edit`, `build` and `score` on a tiny model's folder, and `measure --edit`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope import cli
from stratoscope.editing import clamp
from stratoscope.engine.dictionary import Dictionary
from stratoscope.features import fidelity, splice, transcoder
from stratoscope.layers import concept_depth
from stratoscope.results import load
from stratoscope.tokens import next_token
from support.dictionaries import drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    config = hf.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
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
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    return done.exit_code, " ".join(done.output.split())


def test_every_verb_takes_the_device_that_is_named(folder: Path, tmp_path: Path) -> None:
    """One that is not there is refused by each, before the model is read."""
    (texts := tmp_path / "texts.txt").write_text("w1 w2\n")
    (questions := tmp_path / "items.jsonl").write_text(
        json.dumps({"context": "w1", "choices": ["w2", "w3"], "gold": 0}) + "\n"
    )
    out = ("--out", tmp_path / "kept")
    for verb in (
        ("measure", "tokens.next_token", "--prompt", "w1"),
        ("explain", "w1 w2"),
        ("score", questions),
        ("fit", "training.language_model", "--data", texts, *out),
        ("edit", "editing.clamp", "--request", "[[0,1]]", *out),
    ):
        code, said = run(*verb, "--model", folder, "--device", "gpu")
        assert (code, "device 'gpu': this machine has cpu" in said) == (2, True), (verb[0], said)


def test_fit_trains_a_model(folder: Path, tmp_path: Path) -> None:
    (data := tmp_path / "texts.txt").write_text("w1 w2 w3\n\nw1 w2 w4 w5\nw6 w7\n")
    command = ["fit", "training.language_model", "--model", folder, "--data", data]
    command += ["--set", "steps=8", "--set", "batch_size=2", "--set", "rate=0.01"]
    code, said = run(*command, "--held-out", data, "--out", tmp_path / "tuned")
    assert (code, said) == (0, f"Saved to {tmp_path / 'tuned'}")
    card = json.loads((tmp_path / "tuned" / "card.json").read_text())
    assert card["held_out"]["8"]["targets"] == 2 + 3 + 1
    assert stratoscope.load(tmp_path / "tuned").tokenizer is not None
    assert run(*command, "--held-out", data, "--out", tmp_path / "tuned")[0] == 0  # there already
    code, said = run(*command, "--out", tmp_path / "tuned")
    assert code == 2
    assert "holds something else" in said


def test_fit_saves_probes(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{20 + i % 2}", "label": i % 2} for i in range(1, 13)]
    (data := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["fit", "layers.concept_depth", "--model", folder, "--data", data]
    code, said = run(*command, "--set", "folds=2", "--out", tmp_path / "probes")
    assert code == 0, said
    found = concept_depth.Probes.load(tmp_path / "probes")
    lm = stratoscope.load(folder)
    labels = [row["label"] for row in rows]
    expected = concept_depth.fit(lm, [row["text"] for row in rows], labels=labels, folds=2)
    for name, value in expected.tensors.items():
        assert torch.equal(value, found.tensors[name])
    data.write_text('{"text": "w1"}\n')
    assert "row 1: layers.concept_depth needs a label" in run(*command, "--out", tmp_path / "x")[1]


def test_a_dictionary_is_fitted_and_judged_by_what_it_has_not_seen(
    folder: Path, tmp_path: Path
) -> None:
    lines = [" ".join(f"w{1 + (7 * n + k) % 29}" for k in range(9)) for n in range(40)]
    (texts := tmp_path / "texts.txt").write_text("\n".join(lines))
    command = ["fit", "features.transcoder", "--model", folder, "--texts", texts, "--layer", 1]
    settings = {"width": 12, "sparsity": 3, "steps": 4, "batch_size": 50}
    more = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    code, said = run(*command, "--tokens", 300, *more, "--out", tmp_path / "made")
    assert (code, "On 16 held-out tokens: 2.9 features a token" in said) == (0, True), said
    lm = stratoscope.load(folder)
    kept = [line for number, line in enumerate(lines) if number not in (19, 39)]
    expected = transcoder.fit(lm, kept, layer=1, tokens=300, **settings)
    made = Dictionary.load(tmp_path / "made")
    assert torch.equal(made.W_dec, expected.W_dec)
    judged = fidelity.measure(lm, [lines[19], lines[39]], dictionary=made)
    assert f"{float(judged.increase):+.3f} nats" in said
    assert f"{float(judged.recovered_mean):.3f} against the mean" in said
    (held := tmp_path / "held.txt").write_text(lines[0])
    code, said = run(*command, "--tokens", 330, *more, "--held-out", held, "--out", tmp_path / "b")
    assert (code, "On 8 held-out tokens" in said) == (0, True), said
    wrong = ["fit", "features.sae", *command[2:], "--set", "site=layers.1.mlp.out"]
    assert "features.sae has no option 'layer'" in run(*wrong, "--out", tmp_path / "c")[1]


def test_a_splice_is_made_of_a_folder_kept_and_taken(folder: Path, tmp_path: Path) -> None:
    made = drawn(16, "layers.0.mlp.out")
    made.save(tmp_path / "dictionary")
    kept, model = tmp_path / "splice.safetensors", ("--model", folder)
    command = ["edit", "features.splice", *model, "--request", tmp_path / "dictionary"]
    code, said = run(*command, "--set", 'set={"3": 9.0}', "--set", "off=[5]", "--out", kept)
    assert (code, "3=9" in said) == (0, True), said
    measured = ["measure", "tokens.next_token", *model, "--prompt", "w1 w2"]
    assert run(*measured, "--edit", kept, "--out", tmp_path / "in.nc")[0] == 0
    lm = stratoscope.load(folder)
    with splice.edit(lm, made, off=[5], set={3: 9.0}):
        inside = next_token.measure(lm, "w1 w2")
    assert np.array_equal(load(tmp_path / "in.nc").logit_difference, inside.logit_difference)
    assert not np.array_equal(
        next_token.measure(lm, "w1 w2").logit_difference, inside.logit_difference
    )
    whole = ["measure", "features.fidelity", *model, "--prompt", "w1 w2 w3"]
    code, said = run(*whole, "--set", f"dictionary={tmp_path / 'dictionary'}")
    assert (code, "recovered_mean" in said) == (0, True), said


def test_an_edit_is_kept_and_taken(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "edit.safetensors"
    command = ["edit", "editing.clamp", "--model", folder, "--request", "[[1, 3]]"]
    code, said = run(*command, "--set", "value=9", "--out", kept)
    assert code == 0, said
    assert "1 interventions" in said
    measured = ["measure", "tokens.next_token", "--model", folder, "--prompt", "w1 w2"]
    assert run(*measured, "--edit", kept, "--out", tmp_path / "in.nc")[0] == 0
    assert run(*measured, "--out", tmp_path / "plain.nc")[0] == 0
    lm = stratoscope.load(folder)
    with clamp.edit(lm, [(1, 3)], value=9.0):
        expected = next_token.measure(lm, ["w1 w2"])["probability"]
    np.testing.assert_array_equal(load(tmp_path / "in.nc")["probability"], expected)
    assert not np.array_equal(load(tmp_path / "plain.nc")["probability"], expected)
    assert "does not edit" in run("edit", "layers.logit_lens", *command[2:], "--out", kept)[1]


def test_build_proves_and_saves(tmp_path: Path) -> None:
    method = "architectures.vision.metaformer"
    code, said = run(
        "build", method, "--set", "ratio=2", "--set", "seed=1", "--out", tmp_path / "m"
    )
    assert code == 0, said
    model = stratoscope.load(tmp_path / "m", tokenizer=False).model
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in said
    assert model.config.ratio == 2
    assert "is not empty" in run("build", method, "--out", tmp_path / "m")[1]
    code, said = run("build", method, "--set", "ration=2", "--out", tmp_path / "n")
    assert code == 2
    assert "no setting 'ration'. Did you mean ratio?" in said
    assert not (tmp_path / "n").exists()


def test_score_beside_controls(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"context": f"w{i}", "choices": ["w3", "w4 w5", "w9"], "gold": i % 3, "group": f"g{i % 2}"}
        for i in range(1, 13)
    ]
    (data := tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", data, "--model", folder, "--out", tmp_path / "scores.nc"]
    code, said = run(*command)
    assert code == 0, said
    found = load(tmp_path / "scores.nc")
    assert f"model {100 * float(found['right'].mean()):.1f}%".replace("model ", "") in said
    for words in ("oracle 100.0%", "chance 33.3%", "position 33.3%", "blind ", "of 12", "g0"):
        assert words in said
    kept = tmp_path / "edit.safetensors"
    clamp.edit(stratoscope.load(folder), [(1, 3)], value=50.0).save(kept)
    assert run(*command, "--edit", kept)[0] == 0
    assert not np.array_equal(load(tmp_path / "scores.nc")["logprob"], found["logprob"])
    data.write_text('{"context": "w1", "choices": ["w2"], "gold": 0}\n')
    code, said = run(*command)
    assert code == 2
    assert "items.jsonl, row 1: an item has the choices ['w2']: at least two" in said


@pytest.mark.parametrize("normalise", ["tokens", "blind"])
@pytest.mark.parametrize("bar", ["choices", "without contexts"])
def test_score_goes_on_after_ctrl_c(
    bar: str, normalise: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"context": f"w{i} " * 999 + "w1", "choices": ["w3", "w4 w5"], "gold": i % 2}
        for i in range(1, 7)
    ]
    (data := tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", data, "--model", folder, "--normalise", normalise, "--out"]
    code, unbroken = run(*command, tmp_path / "unbroken.nc")
    assert code == 0, unbroken
    progressed: dict[str, list[int]] = {}

    @contextmanager
    def interrupted(name: str) -> Iterator[Any]:
        def advance(done: int, total: int) -> None:
            progressed.setdefault(name, []).append(done)
            if name == bar:
                raise KeyboardInterrupt

        yield advance

    kept = tmp_path / ".scores.nc.scoring"
    with monkeypatch.context() as patch:
        patch.setattr("stratoscope.cli.score.progress_bar", interrupted)
        code, said = run(*command, tmp_path / "scores.nc")
    assert (code, said) == (130, "Interrupted")
    assert kept.exists()
    assert not (tmp_path / "scores.nc").exists()
    code, said = run(*command, tmp_path / "scores.nc", "--limit", 5)
    assert code == 2
    assert f"{kept} does not hold the beginning of these scores" in said
    at, stopped, bar = bar, progressed[bar], ""
    progressed.clear()
    with monkeypatch.context() as patch:
        patch.setattr("stratoscope.cli.score.progress_bar", interrupted)
        code, said = run(*command, tmp_path / "scores.nc")
    assert (code, said) == (0, unbroken.replace("unbroken.nc", "scores.nc"))
    assert progressed[at][:1] == stopped
    assert load(tmp_path / "scores.nc").identical(load(tmp_path / "unbroken.nc"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "items.jsonl",
        "scores.nc",
        "unbroken.nc",
    ]


def test_what_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    absent = ["--model", tmp_path / "absent", "--data", tmp_path / "x.txt", "--out"]
    assert "cannot be read" in run("fit", "training.classify", *absent, tmp_path / "o")[1]
    assert "does not fit" in run("fit", "layers.logit_lens", *absent, tmp_path / "o")[1]
    gone = run("fit", "training.classify", *absent, tmp_path / "no" / "o")[1]
    assert "does not exist. Create it" in gone
    (csv := tmp_path / "x.csv").write_text("a,b")
    wrong = ["--model", "m", "--data", csv, "--out", tmp_path / "o"]
    assert "give a .txt" in run("fit", "training.classify", *wrong)[1]
    assert "does not build" in run("build", "layers.logit_lens", "--out", tmp_path / "o")[1]
