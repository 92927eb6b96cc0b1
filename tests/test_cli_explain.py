"""`stratoscope explain` on a planted model: what it finds, and what it says when it is given
something wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import stratoscope
from stratoscope.cli import main
from stratoscope.editing import clamp
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.tokens import next_token

CLI = [sys.executable, "-c", "from stratoscope.cli import main; main()"]


@pytest.fixture(scope="module")
def subject() -> planted.Planted:
    return planted.fact_lookup_moved()


@pytest.fixture(scope="module")
def folder(subject: planted.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    subject.model.save_pretrained(place)
    subject.tokenizer.save_pretrained(place)
    return place


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def refusal(result: Result, *words: str) -> None:
    """One paragraph, exit code 2, no traceback, and it says what is the matter."""
    assert result.exit_code == 2, result.output
    text = " ".join(result.stderr.split())
    assert "Traceback" not in text
    assert "Error: " in text
    for word in words:
        assert word in text


def test_it_finds_the_planted_neuron_and_head(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    found = run(
        subject.clean,
        "--corrupt",
        subject.corrupt,
        "--answer",
        subject.answer,
        "--foil",
        subject.foil,
        "--model",
        folder,
        "--out",
        out,
    )
    assert found.exit_code == 0, found.output
    page = out.read_text()
    [(layer, head)] = subject.heads
    [(at, neuron)] = subject.neurons
    assert f"caused by       L{layer}H{head} +" in found.output
    ran_on = "float32 on cpu, attention kernel sdpa"  # --device auto, without a GPU
    assert ran_on in " ".join(found.output.split())
    assert f"tokens of prompt; {ran_on}" in page
    # a moved fact is written by the head, not directly
    assert f"Neuron {neuron} of layer {at}" not in page or at == 1
    assert f"L{layer}H{head}" in page
    assert list(tmp_path.iterdir()) == [out]


def test_it_explains_the_model_as_a_saved_edit_makes_it(
    subject: planted.Planted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is explained is the model inside the edit, and provenance says so."""
    made = clamp.edit(stratoscope.load(folder), sorted(subject.neurons), value=0.0)
    made.save(kept := tmp_path / "off.safetensors")
    seen: list[Any] = []

    def explain(lm: Any, **question: Any) -> None:
        seen.append(next_token.measure(lm, [question["prompt"]]))
        raise InputError("seen enough")

    monkeypatch.setattr("stratoscope.report.explain.explain", explain)
    for edit in ([], ["--edit", kept]):
        found = run(subject.clean, "--model", folder, "--out", tmp_path / "page.html", *edit)
        refusal(found, "seen enough")
    plain, edited = seen
    with made:
        expected = next_token.measure(made.lm, [subject.clean])
    np.testing.assert_array_equal(edited["probability"], expected["probability"])
    assert not np.array_equal(plain["probability"], expected["probability"])
    assert "changes" in edited.attrs["provenance"]
    assert "changes" not in plain.attrs["provenance"]


def test_same_seed_same_report(subject: planted.Planted, folder: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        assert run(subject.clean, "--model", folder, "--out", tmp_path / name).exit_code == 0
        pages.append((tmp_path / name).read_text())
    cut = [page[: page.index('id="provenance"')] for page in pages]  # seconds and memory differ
    assert cut[0] == cut[1]


def test_a_script_in_a_prompt_stays_text(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    tokenizer = subject.tokenizer
    word = next(iter(tokenizer.get_vocab()))
    out = tmp_path / "r.html"
    result = run(f"{subject.clean} {word}", "--model", folder, "--out", out)
    assert result.exit_code in (0, 2)
    assert "<script>alert" not in (out.read_text() if out.exists() else "")


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt(prompt: str, folder: Path, tmp_path: Path) -> None:
    refusal(run(prompt, "--model", folder, "--out", tmp_path / "r.html"), "empty")
    assert not list(tmp_path.iterdir())


def test_prompt_longer_than_the_context(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    result = run(" ".join([subject.clean] * 20), "--model", folder, "--out", tmp_path / "r.html")
    refusal(result, "context is 32", "shorten")


def test_answer_of_several_tokens_uses_the_first_and_says_so(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    both = f"{subject.answer} {subject.foil}"
    result = run(
        subject.clean,
        "--answer",
        both,
        "--foil",
        subject.foil,
        "--model",
        folder,
        "--out",
        tmp_path / "r.html",
    )
    assert result.exit_code == 0, result.output
    assert "2 tokens; its first" in " ".join(result.output.split())
    assert "2 tokens; its first" in (tmp_path / "r.html").read_text()


def test_foil_equal_to_answer(subject: planted.Planted, folder: Path, tmp_path: Path) -> None:
    words = ("--answer", subject.answer, "--foil", subject.answer)
    refusal(
        run(subject.clean, *words, "--model", folder, "--out", tmp_path / "r.html"),
        "same token",
        "another foil",
    )


def test_corrupt_prompt_of_another_length(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    longer = f"{subject.corrupt} {subject.foil}"
    result = run(
        subject.clean, "--corrupt", longer, "--model", folder, "--out", tmp_path / "r.html"
    )
    refusal(result, "same number", "tokens")


def test_folder_without_tokenizer(subject: planted.Planted, tmp_path: Path) -> None:
    subject.model.save_pretrained(tmp_path / "bare")
    result = run(subject.clean, "--model", tmp_path / "bare", "--out", tmp_path / "r.html")
    refusal(result, "no tokenizer", "tokenizer=False")


def test_corrupted_gguf(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    refusal(
        run("hello", "--model", tmp_path / "broken.gguf", "--out", tmp_path / "r.html"),
        "broken.gguf",
    )


def test_model_that_is_nowhere(tmp_path: Path) -> None:
    refusal(
        run("hello", "--model", "nobody/smolm2", "--out", tmp_path / "r.html"),
        "nobody/smolm2",
        "folder",
    )


def test_out_in_a_folder_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    refusal(
        run("hello", "--model", folder, "--out", tmp_path / "no" / "r.html"),
        "folder does not exist",
    )


def test_full_disk_leaves_no_half_report(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    command = [sys.executable, "-c", limit + ignore + "from stratoscope.cli import main; main()"]
    out = tmp_path / "r.html"
    arguments = ["explain", subject.clean, "--model", str(folder), "--out", str(out)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "r.html" in done.stderr
    assert not list(tmp_path.iterdir())


def test_interrupt_exits_with_130_and_keeps_what_was_finished(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.html"
    arguments = ["explain", subject.clean, "--model", str(folder), "--out", str(out)]
    # heads take a minute: the signal is never too late, however busy the machine
    slow = "import time, stratoscope.heads.activation_patching as m\nm.measure = lambda *a, **k: "
    slow += "time.sleep(60)\nfrom stratoscope.cli import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:  # two steps have ended, and left a page
            before.append(line)
            if "which tokens matter: occlusion" in line:
                process.send_signal(signal.SIGINT)
                break
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # Python drops an interrupt that meets a finaliser
            process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130, "".join(before) + rest
    assert "Interrupted" in rest
    assert f"is in {out.as_uri()}" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == [out]
    page = out.read_text()
    assert page.rstrip().endswith("</html>")
    assert "Logit lens: the top token after each layer" in page
    assert "Not measured in this run: which heads carry the answer causally" in page


@pytest.mark.parametrize("name", ["answer", "foil", "corrupt"])
def test_an_empty_word_is_refused_before_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "r.html")
    refusal(
        run("hello", f"--{name}", "", "--model", tmp_path / "nowhere", *out), f"--{name} is empty"
    )


def test_the_prompt_itself_is_no_corrupt_prompt(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    result = run(
        subject.clean,
        "--corrupt",
        f"{subject.clean} ",
        "--model",
        folder,
        "--out",
        tmp_path / "r.html",
    )
    refusal(result, "is the prompt itself")
    assert "which tokens" not in result.stderr


def test_a_step_that_refuses_leaves_its_reason_and_the_others_go_on(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    """One token: nothing before the last can be exchanged, so nothing can be patched."""
    out = tmp_path / "r.html"
    word = subject.clean.split()[-1]
    result = run(word, "--model", folder, "--out", out, "--skip", "heads.roles")
    assert result.exit_code == 0, result.output
    page = out.read_text()
    assert "no token of the prompt before the last is a word" in page
    assert "Logit lens: the top token after each layer" in page
    assert "left out (--skip)" in page
    assert "Without patching heads, and the null: there is no corrupt prompt" in " ".join(
        result.output.split()
    )


def test_a_step_that_is_not_there_cannot_be_skipped(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    refusal(
        run(subject.clean, "--skip", "roles", "--model", folder, "--out", tmp_path / "r.html"),
        "heads.roles",
    )


def test_a_fast_report_and_one_of_a_single_step(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.html"
    fast = run(subject.clean, "--fast", "--model", folder, "--out", out)
    assert fast.exit_code == 0, fast.output
    assert "1/10 loading the model" in fast.stderr
    assert "Left out as you asked: tokens.shapley" in " ".join(fast.output.split())
    assert "Without" not in fast.output
    page = out.read_text()
    assert "Attention heads, layer by head" in page
    assert '<section id="patching">' not in page
    assert '<a href="#patching">' not in page
    assert "Not measured in this run: which heads carry the answer causally" in page
    assert "difference when off" not in page
    one = run(subject.clean, "--only", "layers.logit_lens", "--model", folder, "--out", out)
    assert "2/3 what it predicts" in one.stderr
    assert "3/3 the prediction through the layers" in one.stderr
    page = out.read_text()
    assert "Logit lens: the top token after each layer" in page
    assert "Attention heads, layer by head" not in page
    patched = run(
        subject.clean, "--only", "heads.activation_patching", "--model", folder, "--out", out
    )
    assert "Without" not in patched.output
    assert "Effect of the head outputs" in out.read_text()
    refusal(run(subject.clean, "--only", "lens", "--model", folder, "--out", out), "no such step")


def test_whole_answers_are_scored_whole_and_who_cannot_says_why(
    subject: planted.Planted, folder: Path, tmp_path: Path
) -> None:
    """The terminal, the headline and the places of the sections that ask about one token."""
    words = list(subject.tokenizer.get_vocab())
    other = next(w for w in words if w not in (subject.answer, subject.foil))
    answer, out = f"{subject.answer} {other}", tmp_path / "r.html"
    asked = ("--answer", answer, "--foil", subject.foil, "--corrupt", subject.corrupt)
    found = run(subject.clean, *asked, "--whole", "--model", folder, "--out", out)
    assert found.exit_code == 0, found.output
    said, page = " ".join(found.output.split()), out.read_text()
    assert "both scored whole" in said
    assert "The log probability of the answer" in said
    assert f"Without which components write it: answer '{answer}' cannot be asked whole" in said
    assert "Both are scored as wholes" in page
    assert "not to log probabilities" in page
    assert "Activation patching" in page
    refusal(run(subject.clean, "--answer", answer, "--whole", "--out", out), "--answer and --foil")
