"""Published formats, there and back; a broken row is refused with file, row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stratoscope.benchmarks import Item, formats
from stratoscope.errors import InputError

ROWS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"id": "1", "context": "a b", "choices": ["c", "d e"], "gold": 1, "group": "g"},
        {"id": "2", "context": "", "choices": ["c é", "d", "e"], "gold": 0, "group": ""},
    ],
    "arc": [
        {
            "id": "Mercury_1",
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
            "answerKey": "B",
        }
    ],
    "hellaswag": [
        {
            "ind": "4",
            "activity_label": "Cooking",
            "ctx": "A man takes a pan. He",
            "endings": ["flies.", "puts it on the stove.", "sings."],
            "label": "1",
        }
    ],
    "blimp": [
        {
            "sentence_good": "Cats sleep.",
            "sentence_bad": "Cats sleeps.",
            "UID": "sv",
            "pairID": "0",
        },
        {
            "sentence_good": "A cat sleeps.",
            "sentence_bad": "A cat sleep.",
            "UID": "sv",
            "pairID": "1",
        },
    ],
}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


@pytest.mark.parametrize("name", formats.FORMATS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", [*ROWS[name], ""])
    items = formats.read(path)
    assert items == formats.read(path, format=name)
    formats.write(items, tmp_path / "out.jsonl", format=name)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS[name]
    assert formats.read(tmp_path / "out.jsonl") == items
    formats.write(items, tmp_path / "plain.jsonl")
    assert formats.read(tmp_path / "plain.jsonl") == items


def test_what_the_items_are(tmp_path: Path) -> None:
    def read(name: str) -> list[Item]:
        return formats.read(written(tmp_path / f"{name}.jsonl", ROWS[name]))

    [arc] = read("arc")
    assert arc == Item("Question: Which is hot?\nAnswer:", ("ice", "fire"), 1, "", "Mercury_1")
    [swag] = read("hellaswag")
    assert (swag.context, swag.gold, swag.group) == ("Cooking: A man takes a pan. He", 1, "Cooking")
    first, second = read("blimp")
    assert first == Item("", ("Cats sleep.", "Cats sleeps."), 0, "sv", "sv-0")
    assert second == Item("", ("A cat sleep.", "A cat sleeps."), 1, "sv", "sv-1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "a", "choices": ["b", "c"], "gold": 2}, "`gold` must be a number from 0 to 1"),
        ({"context": "a", "choices": ["b", 3], "gold": 0}, "`choices` must be a list of texts"),
        ({"context": None, "choices": ["b", "c"], "gold": 0}, "`context` must be a text"),
        ({"context": "a", "choices": ["b", "b"], "gold": 0}, "all different"),
        ({"context": "a", "choices": ["b", "c"], "gold": True}, "and is True"),
        ({"context": "a", "choices": ["b", "c"]}, "`gold` must be .* and is absent"),
        ("{'context'", "is no JSON"),
        ("[1]", "one object on each line"),
    ],
)
def test_a_broken_row_is_named(row: Any, words: str, tmp_path: Path) -> None:
    good = {"context": "a", "choices": ["b", "c"], "gold": 0}
    path = written(tmp_path / "x.jsonl", [good, "", row])
    with pytest.raises(InputError, match=rf"x\.jsonl, row 3.*{words}"):
        formats.read(path)


def test_other_broken_files(tmp_path: Path) -> None:
    bad = ROWS["arc"][0] | {"answerKey": "C"}
    with pytest.raises(
        InputError, match=r"row 1: `answerKey` must be one of the 2 labels \(A, B\)"
    ):
        formats.read(written(tmp_path / "arc.jsonl", [bad]))
    with pytest.raises(InputError, match="fields q; no format has them: plain has context"):
        formats.read(written(tmp_path / "q.jsonl", [{"q": 1}]))
    with pytest.raises(InputError, match="holds no row"):
        formats.read(written(tmp_path / "no.jsonl", [""]))
    with pytest.raises(InputError, match="cannot be read"):
        formats.read(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no format 'csv'"):
        formats.read(tmp_path / "no.jsonl", format="csv")
    with pytest.raises(InputError, match="no format 'csv'"):
        formats.write([Item("a", ("b", "c"), 0)], tmp_path / "y", format="csv")
    twice = [ROWS["plain"][0], ROWS["plain"][0]]
    with pytest.raises(InputError, match="two items are called '1'"):
        formats.read(written(tmp_path / "two.jsonl", twice))
    for name, words in (("arc", "no question of ARC"), ("blimp", "no minimal pair")):
        with pytest.raises(InputError, match=words):
            formats.write([Item("a", ("b", "c"), 0)], tmp_path / "z", format=name)
