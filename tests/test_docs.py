"""Docs cannot lie: every error has its page, every site and axis its row, and the README's Python
runs."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from stratoscope import errors
from stratoscope.lab import datasets, miniatures, nets
from stratoscope.lab import page as lab_page
from stratoscope.models import sites
from stratoscope.results import axes
from stratoscope.store.named import NAMED

ROOT = Path(__file__).parent.parent
CLASSES = [
    name for name, kind in inspect.getmembers(errors, inspect.isclass) if name != "StratoscopeError"
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_a_page_with_symptom_cause_and_fix(name: str) -> None:
    page = (ROOT / "docs" / "errors" / f"{name}.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.M) == ["Symptom", "Cause", "Fix"]


def test_no_page_without_an_error() -> None:
    assert {path.stem for path in (ROOT / "docs" / "errors").glob("*.md")} == set(CLASSES)


def test_every_site_is_documented_with_its_axes() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "sites.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    for point, words in {**sites.POINTS, **sites.GLOBAL_POINTS}.items():
        row = next((r for r in rows if re.search(rf"`(layers\.N)?\.?{re.escape(point)}`", r)), "")
        assert row, f"docs/sites.md has no row for {point}"
        assert row.split("|")[2].split() == list(words), row


def test_axes_page_is_generated() -> None:
    assert (ROOT / "docs" / "axes.md").read_text() == axes.page(), "run `make pages`"


def test_the_lab_s_page_is_generated() -> None:
    assert (ROOT / "docs" / "lab.md").read_text() == lab_page.page(), "run `make pages`"
    rows = [line for line in lab_page.page().splitlines() if line.startswith("| `")]
    listed = [row.split("`")[1] for row in rows]
    there = [*datasets.names(), *NAMED, *nets.names(), *miniatures.names()]
    assert listed == there
    sizes = {name: sum(p.size for p in NAMED[name].packages) / 1e6 for name in NAMED}
    assert all(f"| {sizes[n]:.0f} MB |" in row for n, row in zip(listed, rows) if n in sizes)


def test_links_between_pages_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


@pytest.mark.real
def test_readme_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code) == 1
    exec(compile(code[0], "README.md", "exec"), {})
    shown, without = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "heads.activation_patching: effect" in shown
    assert "The largest by chance" in shown
    without = float(without)
    assert 0 < without < 6.1  # the best head is not the whole of it, and its loss costs something


def test_licence_version_and_title_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(
        line.split(": ", 1)
        for line in (ROOT / "CITATION.cff").read_text().splitlines()
        if ": " in line and not line.startswith(" ")
    )
    assert project["license"] == cited["license"] == "Apache-2.0"
    assert (project["version"], project["authors"]) == (
        cited["version"],
        [{"name": "The stratoscope authors"}],
    )
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert {*project["license-files"]} <= {path.name for path in ROOT.iterdir()}
