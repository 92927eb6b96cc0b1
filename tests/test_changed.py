"""Which tests a change reaches: by imports at any distance, by a method's address in quotes, and
everything where everything may be touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import changed

CONTRACT = "tests/test_contract.py"
FILES = {
    "src/stratoscope/__init__.py": "from stratoscope import engine",
    "src/stratoscope/engine/sweep.py": "from stratoscope.maths import norm\n",
    "src/stratoscope/maths/norm.py": "",
    "src/stratoscope/layers/lens.py": "from ..engine import sweep\ndef measure(lm, inputs): ...\n",
    "src/stratoscope/layers/other.py": "def measure(lm, inputs): ...\n",
    "src/stratoscope/report/page.py": 'def page():\n    return module("layers.lens")\n',
    "tests/conftest.py": "",
    "tests/support/tiny.py": "",
    "tests/engine/test_sweep.py": "import stratoscope.engine.sweep\nfrom support import tiny\n",
    "tests/maths/test_norm.py": "from stratoscope.maths import norm\n",
    "tests/layers/test_lens.py": "from stratoscope.layers import lens\n",
    "tests/layers/test_other.py": "from stratoscope.layers import other\n",
    "tests/report/test_page.py": "def test():\n    from stratoscope.report import page\n",
    "tests/claims/test_papers.py": "",
    "tests/lab/test_tasks.py": "",
    "tests/test_guide.py": "",
    "tests/test_arrows.py": "",
    CONTRACT: "from stratoscope import layers\n",
}
METHODS = {"src/stratoscope/layers/lens.py", "src/stratoscope/layers/other.py"}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], []),
        (["docs/page.md"], ["tests/test_arrows.py"]),
        (["src/stratoscope/layers/other.py"], [
            "tests/layers/test_other.py", "tests/test_arrows.py", CONTRACT, "--method=layers.other",
        ]),
        (["tests/layers/test_other.py"], [
            "tests/layers/test_other.py", "tests/test_arrows.py", CONTRACT, "--method=layers.other",
        ]),
        (["src/stratoscope/report/page.py"], ["tests/report/test_page.py", "tests/test_arrows.py"]),
        (["src/stratoscope/layers/lens.py"], [
            "tests/layers/test_lens.py", "tests/report/test_page.py", "tests/test_arrows.py",
            CONTRACT, "--method=layers.lens",
        ]),
        (["src/stratoscope/engine/sweep.py"], [
            "-m", "", "tests/engine/test_sweep.py", "tests/layers/test_lens.py",
            "tests/report/test_page.py", "tests/test_arrows.py", CONTRACT,
        ]),
        (["src/stratoscope/maths/norm.py"], [
            "tests/engine/test_sweep.py", "tests/layers/test_lens.py", "tests/maths/test_norm.py",
            "tests/report/test_page.py", "tests/test_arrows.py", CONTRACT, "--method=layers.lens",
        ]),
        (["tests/support/tiny.py"], ["tests/engine/test_sweep.py", "tests/test_arrows.py"]),
        ([CONTRACT], ["tests/test_arrows.py", CONTRACT]),
        (["src/stratoscope/papers/new_one.py"], [
            "tests/claims/test_papers.py", "tests/test_arrows.py",
        ]),
        (["src/stratoscope/papers/verdicts/new-one.jsonl", "docs/papers/new-one.md"], [
            "tests/claims/test_papers.py", "tests/test_arrows.py",
        ]),
        (["src/stratoscope/lab/tasks/new_one.py"], [
            "tests/lab/test_tasks.py", "tests/test_arrows.py",
        ]),
        (["README.md"], ["tests/test_arrows.py"]),
        (["docs/guide/hour.md"], ["tests/test_arrows.py", "tests/test_guide.py"]),
        (["tests/conftest.py"], ["tests"]),
        (["pyproject.toml", "src/stratoscope/engine/sweep.py"], ["-m", "", "tests"]),
    ],
)  # fmt: skip
def test_what_is_selected(paths: list[str], expected: list[str]) -> None:
    assert changed.selected(paths, FILES, METHODS) == expected


def test_this_repository_is_read(tmp_path: Path) -> None:
    """A method reaches its own test and its paper; the sweep reaches the heads."""
    paths = [path for top in ("src", "tests") for path in (changed.ROOT / top).rglob("*.py")]
    files = {path.relative_to(changed.ROOT).as_posix(): path.read_text("utf-8") for path in paths}
    imports = changed.graph(files)
    found = changed.reached(["src/stratoscope/neurons/top_k.py"], imports)
    assert found == {"src/stratoscope/neurons/top_k.py"}
    lens = changed.reached(["src/stratoscope/layers/logit_lens.py"], imports)
    assert {"tests/layers/test_logit_lens.py", "tests/report/test_page.py"} <= lens
    assert "tests/neurons/test_vocabulary.py" not in lens
    sweep = changed.reached(["src/stratoscope/engine/sweep.py"], imports)
    assert {"tests/heads/test_activation_patching.py", "tests/engine/test_sweep.py"} <= sweep
    assert "tests/results/test_store.py" not in sweep


@pytest.mark.parametrize(
    ("there", "expected"),
    [({"main", "origin/main"}, "main"), ({"origin/main"}, "origin/main"), (set(), "")],
)
def test_a_clone_without_the_branch_asks_where_it_came_from(
    there: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(_: str, name: str, head: str) -> list[str]:
        if name not in there:
            raise subprocess.CalledProcessError(128, ["git"])
        return [name]

    monkeypatch.setattr(changed, "_git", git)
    assert changed.left("main") == expected


def test_nothing_to_compare_with_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(changed, "left", lambda base: "")
    changed.main()
    assert capsys.readouterr() == (
        "tests\n",
        "There is no main here to compare with: all tests run.\n",
    )


def test_it_is_run_from_the_command_line() -> None:
    """Against the checkout's own commit: whatever is changed here, the answer is pytest's words."""
    command = [sys.executable, str(changed.ROOT / "tests/support/changed.py"), "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    words = run.stdout.split()
    assert all(word.startswith(("tests", "-", "'")) for word in words)
