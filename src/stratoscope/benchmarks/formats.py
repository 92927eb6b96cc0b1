"""Read and write benchmarks in their published formats: one JSON object on each line.

    plain       context, choices, gold; group, id
    arc         question, choices {text, label}, answerKey; id      (ARC and its kin)
    hellaswag   ctx, endings, label; activity_label, ind
    blimp       sentence_good, sentence_bad; UID, pairID            (BLiMP and its kin)

What an item's context and choices are is as lm-eval builds them from these files, but that lm-eval
puts a space before whole sentences. A format is told by the fields of the first row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stratoscope.benchmarks import _rows
from stratoscope.benchmarks._item import Item, checked
from stratoscope.benchmarks._rows import Row
from stratoscope.errors import InputError


class Format(NamedTuple):
    """needs: the fields by which it is told."""

    needs: tuple[str, ...]
    item: Callable[[Row], Item]
    row: Callable[[Item], dict[str, Any]]


def read(path: str | Path, *, format: str | None = None) -> list[Item]:
    """Every item of a file, in its order; format: None to tell it by the fields.

    Raises InputError for an unknown format, and for a broken row, with its number and field.
    """
    if format is not None and format not in FORMATS:
        raise _unknown(format)
    path = Path(path)
    items: list[Item] = []
    known = FORMATS.get(format or "")
    for row in _rows.rows(path):
        known = known or _recognised(row)
        try:
            items.append(known.item(row))
        except InputError as error:
            where = f"{path}, row {row.number}"
            raise error if where in str(error) else InputError(f"{where}: {error}") from error
    if not items:
        raise InputError(f"{path} holds no row.")
    return checked(items)


def write(items: Sequence[Item], path: str | Path, *, format: str = "plain") -> None:
    """Write items so that `read` gives them again. Raises InputError for an unknown format, and for
    items that it cannot hold."""
    if format not in FORMATS:
        raise _unknown(format)
    _rows.write(Path(path), [FORMATS[format].row(item) for item in checked(items)])


def _recognised(row: Row) -> Format:
    for known in FORMATS.values():
        if all(name in row for name in known.needs):
            return known
    raise InputError(
        f"{row.path}, row {row.number} has the fields {', '.join(row.fields)}; no format has them: "
        + "; ".join(f"{name} has {', '.join(f.needs)}" for name, f in FORMATS.items())
        + "."
    )


def _unknown(format: str) -> InputError:
    return InputError(f"there is no format {format!r}: choose one of {', '.join(FORMATS)}.")


# --- each format, there and back ------------------------------------------------------------------


def _plain(row: Row) -> Item:
    choices = tuple(row.texts("choices"))
    named = {name: row.text(name) for name in ("group", "id") if name in row}
    return Item(row.text("context"), choices, row.number_in("gold", len(choices)), **named)


def _plain_row(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "context": item.context,
        "choices": list(item.choices),
        "gold": item.gold,
        "group": item.group,
    }


def _arc(row: Row) -> Item:
    choices = row.inner("choices")
    texts, labels = choices.texts("text"), choices.texts("label")
    key = row.text("answerKey")
    if key not in labels or len(labels) != len(texts):
        raise row.wrong("answerKey", f"one of the {len(texts)} labels ({', '.join(labels)})")
    name = row.text("id") if "id" in row else ""
    question = f"Question: {row.text('question')}\nAnswer:"
    return Item(question, tuple(texts), labels.index(key), id=name)


def _arc_row(item: Item) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(item.choices))]
    if not item.context.startswith("Question: ") or not item.context.endswith("\nAnswer:"):
        raise InputError(
            f"item {item.id!r} is no question of ARC, 'Question: ...\\nAnswer:'; it begins "
            f"{item.context!r:.60}: write it as plain."
        )
    return {
        "id": item.id,
        "question": item.context.removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": list(item.choices), "label": labels},
        "answerKey": labels[item.gold],
    }


def _hellaswag(row: Row) -> Item:
    endings = tuple(row.texts("endings"))
    group = row.text("activity_label") if "activity_label" in row else ""
    context = f"{group}: {row.text('ctx')}" if group else row.text("ctx")
    name = str(row.fields.get("ind", ""))
    return Item(context, endings, row.number_in("label", len(endings)), group, name)


def _hellaswag_row(item: Item) -> dict[str, Any]:
    return {
        "ind": item.id,
        "activity_label": item.group,
        "ctx": item.context.removeprefix(f"{item.group}: ") if item.group else item.context,
        "endings": list(item.choices),
        "label": str(item.gold),
    }


def _blimp(row: Row) -> Item:
    """The right sentence comes first in every other row: else its place would tell."""
    choices = (row.text("sentence_good"), row.text("sentence_bad"))
    group = row.text("UID") if "UID" in row else ""
    name = f"{group}-{row.fields['pairID']}" if "pairID" in row else ""
    gold = (row.number - 1) % 2
    return Item("", choices[::-1] if gold else choices, gold, group, name)


def _blimp_row(item: Item) -> dict[str, Any]:
    if item.context or len(item.choices) != 2:
        raise InputError(
            f"item {item.id!r} is no minimal pair: two whole sentences and no context; it has "
            f"{len(item.choices)} and {item.context!r:.60}."
        )
    good, bad = item.choices[item.gold], item.choices[1 - item.gold]
    own = {"UID": item.group, "pairID": item.id.removeprefix(f"{item.group}-")}
    return {"sentence_good": good, "sentence_bad": bad, **{k: v for k, v in own.items() if v}}


FORMATS = {
    "plain": Format(("context", "choices", "gold"), _plain, _plain_row),
    "arc": Format(("question", "choices", "answerKey"), _arc, _arc_row),
    "hellaswag": Format(("ctx", "endings", "label"), _hellaswag, _hellaswag_row),
    "blimp": Format(("sentence_good", "sentence_bad"), _blimp, _blimp_row),
}
