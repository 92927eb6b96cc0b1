"""The pages under `docs/papers/`, their pictures, and the atlas table of the README: generated,
never edited.

    python -m stratoscope.claims.pages            writes them
    python -m stratoscope.claims.pages --check    says what is stale, and exits with 1

They are made of this package's paper files and its `verdicts/`. A picture's name carries a hash of
what it shows, so that what is stale is seen from texts and names alone. A paper has pages of its
own and one line of the index, which git joins by union, so that two branches which each add a paper
do not meet; the table that counts them all, in the README, is made anew where branches come
together, and a branch may leave it behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from stratoscope.claims import ledger, page, paper, register, statement, verdicts, words
from stratoscope.claims.claim import TIERS
from stratoscope.claims.ledger import Atlas, Entry
from stratoscope.errors import ClaimError

ROOT = Path(__file__).parents[3]
FOLDER = Path("docs", "papers")
OPEN, CLOSE = (
    "<!-- atlas: python -m stratoscope.claims.pages writes this -->",
    "<!-- end of atlas -->",
)


def own() -> Atlas:
    """The atlas of this package alone: what the user's cache holds is no part of the pages."""
    return ledger.atlas(folders=[verdicts.home()])


def texts(atlas: Atlas, root: Path = ROOT) -> dict[Path, str]:
    """Every generated text by its path under `root`, the README with its atlas replaced."""
    built = atlas.built()
    pages = {
        FOLDER / f"{entry.row.key}.md": "\n".join(page.lines(entry, entry.paper)) + "\n"
        for entry in built
        if entry.paper
    }
    pages[FOLDER / "README.md"] = "\n".join(_index(atlas, built)) + "\n"
    readme = root / "README.md"
    if readme.is_file() and OPEN in (text := readme.read_text(encoding="utf-8")):
        before, _, rest = text.partition(OPEN)
        pages[Path("README.md")] = (
            f"{before}{OPEN}\n\n{_table(atlas)}\n\n{CLOSE}{rest.partition(CLOSE)[2]}"
        )
    return pages


def pictures(atlas: Atlas) -> dict[Path, str]:
    """Each picture, by its path."""
    return {
        FOLDER / file: drawn
        for entry in atlas.built()
        if entry.paper
        for file, drawn in statement.pictures(entry, entry.paper).items()
    }


def stale(atlas: Atlas, root: Path = ROOT) -> list[str]:
    """What on disk is not what would be written: paths, with what is wrong; and verdicts that say
    they were registered, and were not. The README's counts may be behind.

    A page names the code of its claims and methods, so that one that was made before that code
    changed is not up to date, whether or not its verdicts were stale already.
    """
    wanted = {path: text for path, text in texts(atlas, root).items() if path != Path("README.md")}
    problems = [
        f"{path} is not up to date" for path, text in wanted.items() if _read(root / path) != text
    ]
    missing = [f"{path} is missing" for path in pictures(atlas) if not (root / path).is_file()]
    every = (*atlas.entries.values(), *atlas.across.values())
    every_verdict = [verdict for entry in every for verdict in entry.verdicts]
    problems += missing + [f"{path} is left over" for path in _left_over(atlas, wanted, root)]
    return sorted(problems + register.unproven(every_verdict, paper.FOLDER))


def write(atlas: Atlas, root: Path = ROOT) -> list[Path]:
    """Write what is stale, remove what is left over, and return the paths that changed."""
    if not (root / "docs").is_dir():
        raise ClaimError(
            f"{root} has no docs folder: pages are written in a checkout of the source."
        )
    wanted = texts(atlas, root)
    changed = [path for path, text in wanted.items() if _read(root / path) != text]
    for path in changed:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(wanted[path], encoding="utf-8")
    for path, drawn in pictures(atlas).items():
        if not (root / path).is_file():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(drawn, encoding="utf-8")
            changed.append(path)
    for path in _left_over(atlas, wanted, root):
        (root / path).unlink()
        changed.append(path)
    return changed


def _left_over(atlas: Atlas, wanted: dict[Path, str], root: Path) -> list[Path]:
    there = {path.relative_to(root) for path in (root / FOLDER).rglob("*") if path.is_file()}
    return sorted(there - wanted.keys() - pictures(atlas).keys())


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


# all papers ---------------------------------------------------------------------------------------


def _index(atlas: Atlas, built: list[Entry]) -> Iterator[str]:
    yield from (
        "# The papers",
        "",
        f"Those of the ledger's {len(atlas.entries)} papers that are built.",
    )
    yield "Claims that failed stay. These pages are generated from"
    yield "[the paper files](../../src/stratoscope/papers/) and their recorded verdicts."
    yield from ("", words.RULE)
    yield from ("", "```", "stratoscope papers            # all of them, with what became of each")
    yield from (
        "stratoscope paper KEY         # one of them",
        "stratoscope claim KEY         # run its claims",
        "```",
        "",
    )
    yield from ("| paper | level | real models | miniatures | measured |", "|---|---|---|---|---|")
    for entry in built:
        title = statement.cell(entry.paper.title if entry.paper else entry.row.title)
        summary = entry.words
        models = f", {summary.held} of {summary.tested}" if summary.tested else ""
        when = f"{entry.date}, *stale*" if entry.stale() else entry.date
        yield (
            f"| [{title}]({entry.row.key}.md) | {entry.row.level} | {summary.real}{models} | "
            f"{summary.mechanism} | {when} |"
        )
    yield from ("", "## Tiers", "")
    yield from (f"- **{tier}**: {meaning}." for tier, meaning in TIERS.items())


def _table(atlas: Atlas) -> str:
    counts = atlas.counts()
    rows = [f"| level | {' | '.join(ledger.STATUSES)} |", f"|---|{'---|' * len(ledger.STATUSES)}"]
    for level in [*ledger.levels(), ""]:
        columns = [
            sum(n for (of, word), n in counts.items() if word == s and level in ("", of))
            for s in ledger.STATUSES
        ]
        bold = "" if level else "**"
        rows.append(
            f"| {bold}{level or 'all'}{bold} | "
            f"{' | '.join(f'{bold}{n}{bold}' if n else '' for n in columns)} |"
        )
    return "\n".join([*rows, "", words.RULE])


def main() -> None:
    """Write the pages, or with --check say what is stale."""
    atlas = own()
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(stale(atlas)) or 0)
    for line in (*map(str, write(atlas)), *atlas.problems):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
