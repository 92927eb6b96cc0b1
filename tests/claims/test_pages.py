"""The generated pages: the real ones are not stale; they show failures, and changes after the
measurement."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from stratoscope import catalogue
from stratoscope.claims import code, ledger, pages, register, verdicts
from stratoscope.claims.ledger import Atlas
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.errors import ClaimError


def test_the_pages_of_this_checkout_are_not_stale() -> None:
    assert pages.stale(pages.own()) == [], "run `python -m stratoscope.claims.pages`"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "checkout"
    (made / "docs").mkdir(parents=True)
    (made / "README.md").write_text(f"# Top\n\n{pages.OPEN}\nold\n{pages.CLOSE}\n\nBottom\n")
    return made


def atlas(folder: Path) -> Atlas:
    return ledger.atlas(folder, [folder / "verdicts"])


def measure(folder: Path, seed: int = 0) -> None:
    paper = read(folder / "llm_drop.py")
    verdicts.append(run(paper, paper.named("attention_goes_first")[0], seed), [folder / "verdicts"])


def test_pages_are_written_once(folder: Path, root: Path) -> None:
    measure(folder)
    assert pages.stale(atlas(folder), root)
    assert pages.write(atlas(folder), root)
    assert pages.stale(atlas(folder), root) == []
    assert pages.write(atlas(folder), root) == []
    page = (root / "docs/papers/llm-drop.md").read_text()
    for words in (
        "# What Matters in Transformers? Not All Attention is Needed",
        "[arXiv:2406.15786](https://arxiv.org/abs/2406.15786)",
        "> Half of the attention layers can go at little cost, unlike MLPs.",
        "**On real models: reproduced; 1 of 1 models reproduces every statement.**",
        "| faithful | central | severe | powered | general |",
        "| no: 1 of 1 claim read in the abstract alone | yes: has what the authors would name",
        "[`layers.logit_lens`](../../src/stratoscope/layers/logit_lens.py)",
        "read: abstract (provisional). Here on **a made-up model** (a real model).",
        "| reproduced if | `attention <= 0.5 * mlp and attention < random` |",
        "| null: random | as many layers, drawn at random |",
        "| where the bars come from | half: the ledger's |",
        "| independent units | at least 40 texts |",
        "| a made-up model, seed 0 | **reproduced** | 40 texts | not before: *exploratory* | ",
        "## On the paper's own models\n\nLlama-2-13B, half of its attention layers, on the ",
        "| attention | 0.02 | 0.01 to 0.04 |",
        "| random (null) | 0.35 |  |",
        "Tried on &lt;made-up> numbers",
        "stratoscope claim llm-drop    # the subjects of this page\n",
        "`attention_goes_first` brings its own subject, and cannot be run on another model.",
        "## What would change our mind\n\nNobody has written this down yet.",
        "## What the authors may object\n\nNobody has written this down yet.",
    ):
        assert words in page, words
    [every, picture] = sorted((root / "docs/papers/figures").iterdir())
    assert f"](figures/{every.name})" in page
    assert f"](figures/{picture.name})" in page
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Top\n")
    assert readme.endswith(f"{pages.CLOSE}\n\nBottom\n")
    assert "| layer | 1 |  |  |  |  |  | 8 |" in readme
    assert "| **all** | **1** |  |  |  |  | **1** | **241** |" in readme
    assert (
        "[What Matters in Transformers? Not All Attention is Needed](llm-drop.md) | layer | "
        "reproduced, 1 of 1 |  |" in (root / "docs/papers/README.md").read_text()
    )


def test_a_new_verdict_makes_them_stale_and_replaces_the_picture(folder: Path, root: Path) -> None:
    measure(folder)
    pages.write(atlas(folder), root)
    old, _ = sorted((root / "docs/papers/figures").iterdir())
    measure(folder, seed=7)
    stale = pages.stale(atlas(folder), root)
    assert "docs/papers/llm-drop.md is not up to date" in stale
    assert "docs/papers/README.md is not up to date" in stale
    # counts are made where branches come together
    assert "README.md is not up to date" not in stale
    assert f"docs/papers/figures/{old.name} is left over" in stale
    pages.write(atlas(folder), root)
    new, _ = sorted((root / "docs/papers/figures").iterdir())
    assert new.name != old.name
    page = (root / "docs/papers/llm-drop.md").read_text()
    assert "**On real models: not reproduced; 0 of 1 models reproduce every statement.**" in page
    assert "| a made-up model, seed 7 | **NOT REPRODUCED** | " in page
    assert "| a made-up model, seed 0 | **reproduced** | " in page


def test_no_picture_stands_twice(folder: Path, root: Path) -> None:
    """A second claim that stores the same figure points at the first one's."""
    file = folder / "llm_drop.py"
    text = file.read_text()
    again = text[text.index("@claim(") : text.index("@claim(", text.index("@claim(") + 1)]
    file.write_text(text + "\n\n" + again.replace("attention_goes_first", "attention_again"))
    paper = read(file)
    kept = [folder / "verdicts"]
    for name in ("attention_goes_first", "attention_again"):
        verdicts.append(run(paper, paper.named(name)[0]), kept)
    pages.write(atlas(folder), root)
    page = (root / "docs/papers/llm-drop.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("![")]
    # two forest plots: the claims' own figures say the same
    assert len(shown) == len(list((root / "docs/papers/figures").iterdir())) == 3
    assert page.count("Its picture is the one under *Dropping attention layers costs little") == 1


def test_a_changed_expectation_is_told(folder: Path, root: Path) -> None:
    measure(folder, seed=7)
    file = folder / "llm_drop.py"
    file.write_text(file.read_text().replace("0.5 * mlp", "5 * mlp"))
    pages.write(atlas(folder), root)
    page = (root / "docs/papers/llm-drop.md").read_text()
    assert "**On real models: built, not run; 0 of 1 models reproduce every statement.**" in page
    assert "## Verdicts that do not count" in page
    assert (
        "seed 7: NOT REPRODUCED; the words changed after the measurement: expect was `attention "
        "&lt;= 0.5 * mlp" in page
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "seen"),
    [
        ("llm_drop.py", "0.41, 0.11]", "0.42, 0.11]", True),  # the body of a claim
        ("method.py", "x / 2", "x / 3", True),  # a method that the paper names
        ("method.py", "# halved", "# cut in two", False),
        ("llm_drop.py", "Numbers made up", "Numbers as made up", True),  # told on the page
    ],
)
def test_breaking_a_claim_or_a_method_makes_the_check_fail(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str,
    seen: bool,
) -> None:  # fmt: skip
    """Also where the verdicts were stale before: the page names the code as it stands."""
    package = folder.parent / "package"
    (package / "layers").mkdir(parents=True)
    method = package / "layers" / "logit_lens.py"
    method.write_text("def score(x):\n    # halved\n    return x / 2\n")
    monkeypatch.setattr(catalogue, "ROOT", package)
    code._of_file.cache_clear()
    paper = read(folder / "llm_drop.py")
    verdict = run(paper, paper.named("attention_goes_first")[0])
    verdicts.append(dataclasses.replace(verdict, code={}), [folder / "verdicts"])
    pages.write(atlas(folder), root)
    assert "*Stale.*" in (root / "docs/papers/llm-drop.md").read_text()
    assert pages.stale(atlas(folder), root) == []
    changed = method if file == "method.py" else folder / file
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    code._of_file.cache_clear()
    found = pages.stale(atlas(folder), root)
    assert ("docs/papers/llm-drop.md is not up to date" in found) is seen


def test_a_verdict_that_was_not_registered_makes_the_check_fail(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(folder)
    pages.write(atlas(folder), root)
    monkeypatch.setattr(register, "unproven", lambda kept, place: [f"{len(list(kept))} {place}"])
    assert pages.stale(atlas(folder), root) == [f"1 {folder}"]


def test_only_a_checkout_has_pages(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ClaimError, match="no docs folder"):
        pages.write(atlas(folder), tmp_path)


def test_two_branches_that_each_add_a_paper_merge(folder: Path, root: Path) -> None:
    """Each adds its file, its verdict and its page and brings the index up to date; git joins them,
    and nothing is lost."""
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    repository = root / "src" / "stratoscope" / "papers"
    attributes = (pages.ROOT / ".gitattributes").read_text()
    (root / ".gitattributes").write_text(attributes)

    def branch(name: str, keep: str) -> None:
        git("checkout", "-q", "-b", name, "start")
        repository.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / keep, repository / keep)
        here = ledger.atlas(repository, [repository / "verdicts"])
        if keep == "llm_drop.py":
            paper = here.find("llm-drop").paper
            assert paper
            verdict = run(paper, paper.named("attention_goes_first")[0], 0)
            verdicts.append(verdict, [repository / "verdicts"])
            here = ledger.atlas(repository, [repository / "verdicts"])
        pages.write(here, root)
        git("checkout", "-q", "--", "README.md")  # left behind
        git("add", "-A")
        git("commit", "-qm", name)

    git("init", "-q", "-b", "start")
    pages.write(ledger.atlas(repository, []), root)
    git("add", "-A")
    git("commit", "-qm", "start")
    branch("one", "llm_drop.py")
    branch("two", "lazy_neuron.py")
    git("merge", "-q", "--no-edit", "one")
    both = ledger.atlas(repository, [repository / "verdicts"])
    assert pages.stale(both, root) == []
    index = (root / "docs/papers/README.md").read_text()
    assert index.count("(llm-drop.md)") == index.count("(lazy-neuron.md)") == 1
