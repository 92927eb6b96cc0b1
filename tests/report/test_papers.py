"""A section of the explain report names the paper of its method, its verdict and its figure;
nothing where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratoscope.claims import paper, verdicts
from stratoscope.claims.run import run
from stratoscope.report import page

PAPER = '''"""Saliency Map Verbalization.

Feldhus et al., 2023.
Claim: words say it.
Methods: tokens.verbalize
"""

from stratoscope.claims import Measured, claim
from stratoscope.results import label


@claim(
    says="Words <b>say</b> it",
    where="abstract",
    read="abstract",
    tier="small",
    subject="made up",
    kind="real",
    n="1 text",
    expect="a > b",
    null={"b": "shuffled words"},
)
def words_say_it(seed: int) -> Measured:
    """Made up."""
    words = {"component": ["words", "shuffled"]}
    drawn = label([1.0, 2.0], "component", name="agreement", method="t", coords=words)
    return Measured(values={"a": 1.0}, null={"b": 2.0}, n=1, figure=drawn)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = tmp_path / "papers"
    made.mkdir()
    (made / "saliency_verbalization.py").write_text(PAPER)
    monkeypatch.setattr(paper, "FOLDER", made)
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    page._atlas.cache_clear()
    yield made
    page._atlas.cache_clear()


def measure(folder: Path) -> None:
    built = paper.read(folder / "saliency_verbalization.py")
    verdicts.append(run(built, built.claims[0]))
    page._atlas.cache_clear()  # a report reads the atlas once


def test_a_verdict_is_one_line_and_its_figure(folder: Path, make) -> None:
    without = page.render(make())
    assert 'class="verdict"' not in without
    measure(folder)
    html = page.render(make())
    line = re.search(r'<div class="verdict">\s*<p>(.+?)</p>', html)
    assert line
    assert re.sub(r"<.*?>", "", line[1]).startswith(
        "The paper behind this: Saliency Map Verbalization, not reproduced 20"
    )
    assert "Words &lt;b&gt;say&lt;/b&gt; it" in html
    assert (
        html.count('<script type="application/json">')
        == without.count('<script type="application/json">') + 1
    )
    assert (
        html.index('id="tokens"') < html.index('<div class="verdict">') < html.index('id="circuit"')
    )


def test_a_method_that_did_not_run_brings_no_paper(folder: Path, make) -> None:
    measure(folder)
    made = make()
    results = {key: value for key, value in made.results.items() if key != "tokens.verbalize"}
    import dataclasses

    assert 'class="verdict"' not in page.render(dataclasses.replace(made, results=results))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_the_figure_is_drawn(folder: Path, make, tmp_path: Path) -> None:
    measure(folder)
    path = page.write(make(), tmp_path / "report.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        f"--user-data-dir={tmp_path}/chromium",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=900,
    )
    inside = done.stdout.partition('<div class="verdict">')[2].partition("</figure>")[0]
    assert 'class="main-svg"' in inside
    assert "shuffled" in inside
