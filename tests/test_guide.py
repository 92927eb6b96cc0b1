"""The guide is true: its blocks run in one session, and print what it says they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "first-hour.md"
BLOCKS = re.findall(r"```python\n(.+?)```\s+```text\n(.+?)```", GUIDE.read_text("utf-8"), re.S)


def test_every_block_is_followed_by_what_it_prints() -> None:
    assert len(BLOCKS) == GUIDE.read_text("utf-8").count("```python") >= 8


@pytest.mark.real
def test_the_first_hour(capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, object] = {}
    for code, printed in BLOCKS:
        exec(compile(code, GUIDE.name, "exec"), session)
        assert capsys.readouterr().out == printed, code
