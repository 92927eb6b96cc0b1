"""Build the zoo and write the table of architectures: `make families`. No network
is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratoscope.errors import FamilyError
from stratoscope.models import wrap
from stratoscope.models.families._table import Entry, of, page, write
from support import tiny, zoo, zoo_encoders, zoo_signals, zoo_towers, zoo_vlms

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def found(name: str, kind: Any, make: Any) -> Entry:
    try:
        return of(name, kind, make())
    except FamilyError as error:
        return Entry(name, kind, "refused", why=str(error).split("), and ")[-1])


def entries() -> list[Entry]:
    causal = [found(name, "causal", lambda name=name: zoo.lm(name)) for name in zoo.MAKERS]
    causal += [Entry(name, "causal", "not tried", why=why) for name, why in zoo.NOT_BUILT.items()]
    rows = sorted(causal, key=lambda entry: entry.type)
    named = {entry.type for entry in rows if entry.status != "not tried"}
    others: list[Entry] = []
    for name, lm in _beside():
        entry = found(name, _kind(name), lm)
        if entry.status != "refused":
            entry = Entry(**vars(entry) | {"type": lm().model.config.model_type})
        if entry.type not in named:
            named.add(entry.type)
            others.append(entry)
    return rows + sorted(others, key=lambda entry: (entry.kind, entry.type))


def _kind(name: str) -> str:
    if name in zoo_towers.MODELS:
        return "encoder-decoder"
    if name in zoo_signals.ALL:
        return "series"
    encoders = (*tiny.ENCODERS, *zoo_encoders.TEXT, *zoo_encoders.UNREAD)
    return "encoder" if name in encoders else "vision"


def _beside() -> Any:
    for name in tiny.CONFIGS:
        if name not in tiny.DECODERS:
            yield name, lambda name=name: tiny.lm(name)
    for name in zoo_encoders.ALL:
        yield name, lambda name=name: zoo_encoders.lm(name)
    for name in zoo_vlms.ALL:
        yield name, lambda name=name: zoo_vlms.lm(name)
    for name in zoo_towers.MODELS:
        yield name, lambda name=name: zoo_towers.lm(name)
    for name in zoo_signals.ALL:
        yield name, lambda name=name: zoo_signals.lm(name)
    for name, (maker, _) in zoo_encoders.REFUSED.items():
        yield name, lambda maker=maker: wrap(zoo_encoders.build(maker))


if __name__ == "__main__":
    rows = entries()
    write(rows)
    PAGE.write_text(page(rows), "utf-8")
