"""List, make and describe what studies run on: datasets, real models, trained miniatures.

Examples:

stratoscope lab list

stratoscope lab make enwik8
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stratoscope import catalogue
from stratoscope._threads import use_free_cores
from stratoscope.cli import _options
from stratoscope.errors import InputError
from stratoscope.store.cache import cache_root
from stratoscope.store.named import NAMED

KINDS = ("datasets", "models", "miniatures")


@dataclass(frozen=True)
class Subject:
    """A line of the list: what it is, what it costs to get, and how much of the disk it takes if it
    is here."""

    kind: str
    name: str
    about: str
    licence: str
    size: int  # bytes to download
    shared: bool  # one download serves several
    held: int  # bytes here; 0 when it is not


@click.group(help=__doc__)
def command() -> None:
    pass


@command.command("list")
@click.argument("kind", required=False, type=click.Choice(KINDS))
def list_command(kind: str | None) -> None:
    """List what there is, its licence, and what of it is on this machine.

    With KIND, only the datasets, the models or the miniatures.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for one in KINDS if kind is None else (kind,):
        table = Table(
            box=box.SIMPLE_HEAD, title=one, title_justify="left", title_style="bold", expand=True
        )
        table.add_column("name", no_wrap=True)
        table.add_column("what it is", ratio=1, overflow="fold")
        table.add_column("here", no_wrap=True, justify="right")
        table.add_column(
            "download" if one != "miniatures" else "to make", no_wrap=True, justify="right"
        )
        for subject in _SUBJECTS[one]():
            says = Text(subject.about)
            if subject.licence:
                says.append(f"\n{subject.licence.partition(';')[0]}", style="dim")
            here = _megabytes(subject.held) if subject.held else "-"
            table.add_row(subject.name, says, here, _cost(subject))
        console.print(table)
        if one == "datasets":
            console.print(
                "  * One download, and one folder, for all datasets with this number.\n",
                style="dim",
            )
    console.print(
        f"The cache is {cache_root()}; `stratoscope lab make NAME` puts one there.",
        style="dim",
        soft_wrap=True,
    )


@command.command()
@click.argument("name")
@click.option(
    "--seed", default=0, show_default=True, help="For a miniature: the seed it is trained from."
)
@click.option(
    "--path",
    type=click.Path(path_type=Path),
    help="For a download: its archive, or a folder that holds it.",
)
def make(name: str, seed: int, path: Path | None) -> None:
    """Fetch a dataset or model, or train a miniature, and print its folder."""
    use_free_cores()
    from stratoscope import lab
    from stratoscope.store import pretrained

    subject = _find(name)
    say: Callable[[str], object] = lambda words: click.echo(words, err=True)  # noqa: E731
    if subject.kind == "miniatures":
        folder = lab.make(name, seed=seed)  # shows a bar of its own
    elif name in NAMED:
        folder = pretrained.local_folder(name, path=path, progress=say)
    elif subject.kind == "models":
        folder = lab.nets.fetch(name, path=path, progress=say)
    else:
        folder = lab.datasets.fetch(name, path=path, progress=say)
    click.echo(str(folder))


@command.command()
@click.argument("name")
@click.option(
    "--seed", default=0, show_default=True, help="For a miniature: the seed it was trained from."
)
@click.option("--json", "as_json", is_flag=True, help="The whole card, as JSON.")
def card(name: str, seed: int, as_json: bool) -> None:
    """Say what one is: source, licence, splits; of a miniature, how it was trained and how well it
    does."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    subject = _find(name)
    fields = _card(subject, seed)
    if as_json:
        click.echo(json.dumps(fields, indent=2, ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for key, value in fields.items():
        told_already = key == "held_out" and list(value.values()) == [fields.get("results")]
        if value not in (None, "", [], {}) and not told_already:
            table.add_row(key.replace("_", " "), Text(_worded(key, value)))
    Console(highlight=False).print(table)


def _card(subject: Subject, seed: int) -> dict[str, Any]:
    from stratoscope import lab
    from stratoscope.store import pretrained

    if subject.kind == "miniatures":
        return lab.card(subject.name, seed=seed)
    if subject.kind == "datasets":
        return lab.datasets.card(subject.name)
    if subject.name not in NAMED:
        return lab.nets.card(subject.name)
    source = NAMED[subject.name]
    return {
        "name": subject.name,
        "source": source.upstream,
        "licence": source.licence,
        "precision": source.precision,
        "packages": [f"{package.registry}: {package.requirement}" for package in source.packages],
        "sha256": [package.sha256 for package in source.packages],
        "download_bytes": sum(package.size for package in source.packages),
        "folder": str(pretrained.place(subject.name) or ""),
    }


def _find(name: str) -> Subject:
    subjects = {subject.name: subject for kind in KINDS for subject in _SUBJECTS[kind]()}
    if name not in subjects:
        hint = _options.meant(name, subjects, "`stratoscope lab list` shows them.")
        raise InputError(f"There is no dataset, model or miniature {name!r}. {hint}")
    return subjects[name]


def _datasets() -> Iterator[Subject]:
    from stratoscope.lab import datasets

    for name in datasets.names():
        yield _downloaded("datasets", datasets.card(name))


def _models() -> Iterator[Subject]:
    from stratoscope.lab import nets
    from stratoscope.store import pretrained

    for name, source in NAMED.items():
        about = f"{source.upstream}\n{source.precision}"
        size = sum(package.size for package in source.packages)
        yield Subject(
            "models", name, about, source.licence, size, False, _held(pretrained.place(name))
        )
    for name in nets.names():
        yield _downloaded("models", nets.card(name))


def _downloaded(kind: str, card: dict[str, Any]) -> Subject:
    held, shared = _held(card["folder"]), "shared" in card
    return Subject(
        kind, card["name"], card["about"], card["licence"], card["download_bytes"], shared, held
    )


def _miniatures() -> Iterator[Subject]:
    from stratoscope.lab import miniatures

    files = Path(miniatures.__file__).parent
    for name in miniatures.names():
        about = catalogue.summary((files / f"{name.replace('-', '_')}.py").read_text("utf-8"))
        yield Subject("miniatures", name, about, "", 0, False, _trained(name))


def _trained(name: str) -> int:
    """Bytes of the miniature of seed 0, if it is trained; only then is its file, which needs torch,
    opened."""
    from stratoscope import lab

    if not any((cache_root() / "miniatures").glob(f"{name}-seed0-*/card.json")):
        return 0
    # what is there was trained by another version, or with other settings
    with suppress(InputError):
        return sum(lab.card(name)["bytes"].values())
    return 0


_SUBJECTS: dict[str, Callable[[], Iterator[Subject]]] = {
    "datasets": _datasets,
    "models": _models,
    "miniatures": _miniatures,
}


def _held(folder: Path | str | None) -> int:
    return (
        0
        if not folder
        else sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    )


def _cost(subject: Subject) -> str:
    return (
        f"{_megabytes(subject.size)}{'*' if subject.shared else ' '}"
        if subject.size
        else "training"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _worded(key: str, value: Any) -> str:
    """A field of a card for reading: sizes in MB, lists one to a line, long ones cut in the middle.
    key: "" inside one."""
    if key == "download_bytes":
        return _megabytes(value)
    if isinstance(value, dict):
        between = "\n" if key else ", "  # a table within a table is one line
        return between.join(f"{name}: {_worded('', inner)}" for name, inner in value.items())
    if isinstance(value, list):
        rows = (item if isinstance(item, list) else [item] for item in value)
        lines = [" ".join(_worded("", part) for part in row) for row in rows]
        if len(lines) > 12:
            lines = [*lines[:4], f"... {len(lines) - 8} more, `--json` shows all ...", *lines[-4:]]
        return "\n".join(lines)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
