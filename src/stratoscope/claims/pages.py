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

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from stratoscope import catalogue
from stratoscope.claims import draw, figure, ledger, verdicts
from stratoscope.claims.claim import FAILED, TIERS, Claim, Verdict
from stratoscope.claims.draw import short
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
    built = [entry for entry in atlas.entries.values() if entry.paper]
    pages = {FOLDER / f"{entry.row.key}.md": "\n".join(_page(entry)) + "\n" for entry in built}
    pages[FOLDER / "README.md"] = "\n".join(_index(atlas, built)) + "\n"
    readme = root / "README.md"
    if readme.is_file() and OPEN in (text := readme.read_text(encoding="utf-8")):
        before, _, rest = text.partition(OPEN)
        pages[Path("README.md")] = (
            f"{before}{OPEN}\n\n{_table(atlas)}\n\n{CLOSE}{rest.partition(CLOSE)[2]}"
        )
    return pages


def pictures(atlas: Atlas) -> dict[Path, Verdict]:
    """The verdict behind every picture, by the picture's path."""
    shown = (
        verdict
        for entry in atlas.entries.values()
        for _, verdict in entry.counting()
        if verdict.figure
    )
    return {FOLDER / _picture(verdict): verdict for verdict in shown}


def stale(atlas: Atlas, root: Path = ROOT) -> list[str]:
    """What on disk is not what would be written: paths, with what is wrong. The README's counts may
    be behind."""
    wanted = {path: text for path, text in texts(atlas, root).items() if path != Path("README.md")}
    found = [
        f"{path} is not up to date" for path, text in wanted.items() if _read(root / path) != text
    ]
    missing = [f"{path} is missing" for path in pictures(atlas) if not (root / path).is_file()]
    return sorted(
        found + missing + [f"{path} is left over" for path in _left_over(atlas, wanted, root)]
    )


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
    for path, verdict in pictures(atlas).items():
        if not (root / path).is_file() and verdict.figure:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            drawn = draw.svg(figure.drawing(figure.decode(verdict.figure)), verdict.null)
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


def _picture(verdict: Verdict) -> str:
    name = figure.digest(verdict.figure or {}, verdict.null)
    return f"figures/{verdict.key}.{verdict.claim}.{name}.svg"


# one paper ----------------------------------------------------------------------------------------


def _page(entry: Entry) -> Iterator[str]:
    paper, row = entry.paper, entry.row
    if paper is None:
        return
    source = _prose(paper.source)
    if paper.arxiv:
        link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        source = re.sub(r"arXiv:\s*" + re.escape(paper.arxiv), link, source)
    yield from (f"# {_prose(paper.title)}", "", source, "", f"> {_prose(paper.claim)}", "")
    tally = f", {entry.tally} small claims hold at least in direction" if entry.tally else ""
    old = entry.stale()
    yield f"**{entry.status}**{', *stale*' if old else ''}{tally}. Level: {row.level}."
    if old:
        yield ""
        yield (
            f"*Stale*: what {', '.join(f'`{name}`' for name in old)} was measured with has "
            "changed since."
        )
        yield (
            f"`stratoscope papers --stale` says what, `stratoscope claim {row.key}` measures again."
        )
    yield ""
    yield (
        f"Methods: {', '.join(map(_method, paper.methods))}. Claims: "
        f"{_link(paper.path.stem, 'papers', paper.path.stem)}."
    )
    for claim in paper.claims:
        if claim.tier != "identity":
            yield from _claim(entry, claim)
    for claim in paper.claims:
        if claim.tier == "identity":
            yield from ("", f"## Identity: {_prose(claim.says)}", "")
            yield (
                f"`{claim.name}` on {_prose(claim.subject)} expects `{claim.expect}`; it runs "
                "in "
                "every test run."
            )
            yield from _after(claim.about)
    if outdated := [verdict for verdict in entry.outdated() if verdict.tier != "identity"]:
        yield from ("", "## Verdicts that do not count", "")
        for verdict in outdated:
            yield f"- {verdict.date[:10]} `{verdict.claim}`: {_changed(verdict, paper.claims)}"


def _claim(entry: Entry, claim: Claim) -> Iterator[str]:
    verdict = entry.verdict(claim)
    yield from ("", f"## {_prose(claim.says)}", "")
    yield f"*{_prose(claim.where)}*; here on **{_prose(claim.subject)}**."
    yield from _after(claim.about)
    yield from ("", "| | |", "|---|---|")
    yield f"| expected, before measuring | `{claim.expect}` |"
    if claim.direction:
        yield f"| the direction alone | `{claim.direction}` |"
    yield f"| the null | {_cell(claim.null)} |"
    if verdict is None:
        yield f"| verdict | {ledger.NOT_RUN} |"
    else:
        word = verdict.status.upper() if verdict.status == FAILED else verdict.status
        yield (
            f"| verdict | **{word}**, {verdict.date[:10]}, n = {verdict.n:,}, "
            f"{verdict.seconds:,.0f} s, seed {verdict.seed} |"
        )
        for other in entry.seeds(claim)[1:]:
            yield f"| seed {other.seed} | {other.status}, {other.date[:10]} |"
        yield from _numbers(verdict)
        if verdict.figure:
            yield from ("", f"![{_prose(claim.says)}]({_picture(verdict)})")
        yield from _after(verdict.note)
        yield from (
            "",
            f"Measured with {', '.join(f'{name} {v}' for name, v in verdict.versions.items())}.",
        )
    yield from (
        "",
        "```",
        f"stratoscope claim {entry.row.key} --tier {claim.tier} --claim {claim.name}",
        "```",
    )


def _numbers(verdict: Verdict) -> Iterator[str]:
    yield from ("", "| measured | value | interval |", "|---|---|---|")
    for name, value in {**verdict.values, **verdict.null}.items():
        null = " (null)" if name in verdict.null else ""
        around = " to ".join(map(short, verdict.interval[name])) if name in verdict.interval else ""
        yield f"| {_cell(name.replace('_', ' '))}{null} | {short(value)} | {around} |"


def _changed(verdict: Verdict, claims: tuple[Claim, ...]) -> str:
    now = next((claim for claim in claims if claim.name == verdict.claim), None)
    if now is None:
        return f"{verdict.status}; the claim is no longer in the file."
    if (now.expect, now.direction) == (verdict.expect, verdict.direction):
        return (
            f"{verdict.status}, on {verdict.subject} at tier {verdict.tier}; the claim is "
            "about "
            "another subject now."
        )
    was = f"`{verdict.expect}`" + (
        f" (direction `{verdict.direction}`)" if verdict.direction else ""
    )
    return f"{verdict.status}; **the expectation changed after the measurement**. It was {was}."


# all papers ---------------------------------------------------------------------------------------


def _index(atlas: Atlas, built: list[Entry]) -> Iterator[str]:
    yield from (
        "# The papers",
        "",
        f"Those of the ledger's {len(atlas.entries)} papers that are built.",
    )
    yield (
        "A paper's word is the worst among its small claims; failed claims stay. These pages "
        "are "
        "generated from"
    )
    yield "[the paper files](../../src/stratoscope/papers/) and their recorded verdicts."
    yield from ("", "```", "stratoscope papers            # all of them, with what became of each")
    yield from (
        "stratoscope paper KEY         # one of them",
        "stratoscope claim KEY         # run its claims",
        "```",
        "",
    )
    yield from ("| paper | level | verdict | small claims | measured |", "|---|---|---|---|---|")
    for entry in sorted(built, key=lambda e: (ledger.levels().index(e.row.level), e.row.key)):
        title = _cell(entry.paper.title if entry.paper else entry.row.title)
        yield (
            f"| [{title}]({entry.row.key}.md) | {entry.row.level} | {_word(entry)} | "
            f"{entry.tally} | {entry.date} |"
        )
    yield from ("", "## Tiers", "")
    yield from (f"- **{tier}**: {words}." for tier, words in TIERS.items())


def _word(entry: Entry) -> str:
    return f"{entry.status}, *stale*" if entry.stale() else entry.status


def _table(atlas: Atlas) -> str:
    counts = atlas.counts()
    rows = [f"| level | {' | '.join(ledger.STATUSES)} |", f"|---|{'---|' * len(ledger.STATUSES)}"]
    for level in [*ledger.levels(), ""]:
        found = [
            sum(n for (of, word), n in counts.items() if word == s and level in ("", of))
            for s in ledger.STATUSES
        ]
        bold = "" if level else "**"
        rows.append(
            f"| {bold}{level or 'all'}{bold} | "
            f"{' | '.join(f'{bold}{n}{bold}' if n else '' for n in found)} |"
        )
    return "\n".join(rows)


# words --------------------------------------------------------------------------------------------


def _after(text: str) -> tuple[str, ...]:
    return ("", _prose(text)) if text else ()


def _prose(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


def _method(address: str) -> str:
    room, _, name = address.partition(".")
    return _link(address, room, name)


def _link(text: str, room: str, name: str) -> str:
    """A link to the source, if it is there: a page must not point at nothing."""
    there = (catalogue.ROOT / room / f"{name}.py").is_file()
    return f"[`{text}`](../../src/stratoscope/{room}/{name}.py)" if there else f"`{text}`"


def main() -> None:
    """Write the pages, or with --check say what is stale."""
    atlas = own()
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(stale(atlas)) or 0)
    for line in (*map(str, write(atlas)), *atlas.problems):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
