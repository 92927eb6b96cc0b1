"""A paper file, read by its text: nothing is imported, so that one broken file cannot hide the
others.

    '''Title.

    Authors, 2024. arXiv:2406.15786.
    Claim: what the paper says, in one sentence.
    Methods: room.method, room.method
    Protocol: what would be run on the paper's own models: which, on what data, how many.
    What would change our mind: the result that would make us take the word back.
    What the authors may object: where we differ from them, and why it might matter.
    '''

and below it the functions that `@claim(...)` marks, whose words are plain text. The last three
parts may be missing: the page then says so. A file of ours that runs several papers on one thing
has `Across: KEY, KEY` in its docstring and no line in the ledger.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stratoscope import catalogue
from stratoscope.claims.claim import Claim, stated
from stratoscope.errors import ClaimError

FOLDER = Path(__file__).parent.parent / "papers"

_ARXIV = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5})", re.IGNORECASE)
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
# parts that a paper may leave out, and what is then said to be missing
MIND, OBJECT = "What would change our mind", "What the authors may object"
OPTIONAL = ("Protocol", MIND, OBJECT)
_PART = re.compile(rf"^(Claim|Methods|Across|{'|'.join(OPTIONAL)}):", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper file. source: the line with authors, year and where it appeared; arxiv: its number,
    or ""; protocol: what would be run on the paper's own models; would_change, may_object: what
    would change our mind, and what the authors may object. "" where a part is not written. across:
    the keys of the papers that a file of ours runs together; none for a paper of the ledger."""

    key: str
    path: Path
    title: str
    source: str
    authors: str
    year: int
    arxiv: str
    claim: str
    methods: tuple[str, ...]
    protocol: str
    would_change: str
    may_object: str
    across: tuple[str, ...]
    claims: tuple[Claim, ...]

    @property
    def unsaid(self) -> list[str]:
        """The parts that are not written yet."""
        texts = (self.protocol, self.would_change, self.may_object)
        return [part for part, text in zip(OPTIONAL, texts) if not text]

    def named(
        self, name: str | None = None, tier: str | None = None, subject: str | None = None
    ) -> list[Claim]:
        """The claims of that name, tier and subject. Raises ClaimError when there is none."""
        request = {"name": name, "tier": tier, "subject": subject}
        given = {word: value for word, value in request.items() if value is not None}
        chosen = [c for c in self.claims if all(getattr(c, w) == v for w, v in given.items())]
        if not chosen:
            have = ", ".join(f"{c.name} ({c.tier}, {c.subject})" for c in self.claims)
            called = f" named {name!r}" if name else ""
            on = f" on {subject!r}" if subject else ""
            raise ClaimError(
                f"{self.key} has no {f'{tier} ' if tier else ''}claim{called}{on}; it has {have}."
            )
        return chosen

    def statements(self) -> list[list[Claim]]:
        """The claims by the function that measures them: one for each of its subjects."""
        by_name: dict[str, list[Claim]] = {}
        for claim in self.claims:
            by_name.setdefault(claim.name, []).append(claim)
        return list(by_name.values())


def shelf(folder: Path | None = None) -> tuple[dict[str, Paper], dict[str, str]]:
    """The papers that can be read, by key, and what is wrong with the others, by file name."""
    papers, broken = {}, {}
    for path in sorted((folder or FOLDER).glob("[!_]*.py")):
        try:
            paper = read(path)
        except ClaimError as error:
            broken[path.name] = str(error)
        else:
            papers[paper.key] = paper
    return papers, broken


def read(path: Path) -> Paper:
    """The paper of one file. Raises ClaimError with the file's name and what it lacks."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        title, source, parts = _paragraphs(catalogue.docstring(text))
        claims = tuple(_claims(tree))
    except (OSError, SyntaxError, ValueError, ClaimError) as error:
        raise ClaimError(f"{path.name} cannot be read as a paper: {error}") from error
    year, arxiv = _YEAR.search(source), _ARXIV.search(source)
    if not claims or not year:
        lacks = (
            "a year in the line under its title" if claims else "a function marked with @claim(...)"
        )
        raise ClaimError(f"{path.name} cannot be read as a paper: it lacks {lacks}.")
    return Paper(
        key=path.stem.replace("_", "-"),
        path=path,
        title=title,
        source=source,
        authors=source[: year.start()].strip(" ,.("),
        year=int(year[0]),
        arxiv=arxiv[1] if arxiv else "",
        claim=parts["Claim"],
        methods=_listed(parts["Methods"]),
        protocol=parts.get("Protocol", ""),
        would_change=parts.get(MIND, ""),
        may_object=parts.get(OBJECT, ""),
        across=_listed(parts.get("Across", "")),
        claims=claims,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip(" .`")))


def _paragraphs(docstring: str) -> tuple[str, str, dict[str, str]]:
    """Title, source line and the parts that open with `Claim:` and so on, each on one line."""
    title, _, rest = docstring.partition("\n\n")
    source, *parts = _PART.split(rest)
    # a part ends at an empty line: what follows may be anything
    paragraphs = {
        name: " ".join(text.partition("\n\n")[0].split())
        for name, text in zip(parts[::2], parts[1::2])
    }
    for name in ("Claim", "Methods"):
        if not paragraphs.get(name):
            raise ClaimError(f"its docstring has no line `{name}: ...`.")
    return " ".join(title.split()).rstrip("."), " ".join(source.split()), paragraphs


def _claims(tree: ast.Module) -> Iterator[Claim]:
    seen = set()
    for node in tree.body:
        marks = [
            m
            for m in getattr(node, "decorator_list", [])
            if isinstance(m, ast.Call) and _name(m) == "claim"
        ]
        if not marks or not isinstance(node, ast.FunctionDef):
            continue
        if node.name in seen:
            raise ClaimError(f"it has two claims named {node.name}.")
        seen.add(node.name)
        about = " ".join((ast.get_docstring(node) or "").split())
        parameters = [argument.arg for argument in node.args.args]
        try:
            words = {str(word.arg): ast.literal_eval(word.value) for word in marks[0].keywords}
        except ValueError as error:
            raise ClaimError(
                f"the words of claim {node.name} must be plain text, not computed."
            ) from error
        try:
            yield from stated(node.name, parameters, words | {"about": about})
        except (TypeError, AttributeError) as error:  # a word too many, too few, or of a wrong kind
            raise ClaimError(f"claim {node.name}: {error}.") from error


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]
