"""The recipes are true: each one's blocks run in one session, and print what it says they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.md"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block of Python with what stands under it as its output."""
    return re.findall(r"```python\n(.+?)```\s+```text\n(.*?)```", page.read_text("utf-8"), re.S)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_every_block_is_followed_by_what_it_prints(page: Path) -> None:
    assert len(blocks(page)) == page.read_text("utf-8").count("```python") > 0
    assert all(printed for _, printed in blocks(page))


@pytest.mark.real
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_recipe(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for code, printed in blocks(page):
        exec(compile(code, page.name, "exec"), session)
        assert capsys.readouterr().out == printed, code
