"""A new paper's files, begun from its row of the ledger and its entry in a specification.

    python -m stratoscope.claims.skeleton KEY [--spec FILE] [--method ROOM.NAME]       (make new
    KEY)

Four files that pass the linter and fail their test until they are written: the method, its test,
the paper, a line for the changelog. The verdicts and the page come with the first `stratoscope
claim` and `make pages`. No file that exists is touched.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click

from stratoscope.claims import expression, ledger
from stratoscope.claims.ledger import Row
from stratoscope.errors import ClaimError, StratoscopeError

ROOT = Path(__file__).parents[3]
# where a paper of a level usually has its method, and the verb it usually offers
ROOMS = {
    "token": "tokens", "embedding": "embeddings", "neuron": "neurons", "head-circuit": "heads",
    "layer": "layers", "model-editing": "editing", "retrieval": "retrieval",
    "training": "training", "evaluation": "benchmarks",
}  # fmt: skip
VERBS = {
    "editing": "edit",
    "training": "fit",
    "retrieval": "fit",
    "architectures": "build",
    "benchmarks": "items",
}
_ROOMS = (
    "tokens|embeddings|neurons|features|heads|layers|circuits|editing|retrieval|vision"
    "|architectures|training|benchmarks"
)
# of architectures/
_SHELVES = "recommend|graphs|molecules|series|codecs|control|rows|bytes|generate|memory"
_FILE = re.compile(rf"`((?:{_ROOMS}|{_SHELVES})(?:/\w+)*)/(\w+)\.py")
_GIVEN = {
    "edit": "lm: LM, request: Any", "build": "config: Any", "items": "seed: int",
    "measure": "lm: LM, inputs: Any", "fit": "lm: LM, inputs: Any",
}  # fmt: skip

_EXAMPLES = {
    "edit": '{"edit": {"request": []}}',
    "build": '{"build": {}, "built": {"examples": [[3, 4, 5], [6, 7]], "parameters": 0}}',
    "items": '{"items": {}}',
    "measure": '{"measure": {}}',
    "fit": '{"fit": {}}',
}


@dataclass(frozen=True)
class Plan:
    """What is to be written for one paper. room: `layers`, or `architectures/vision`; entry: the
    specification's, or ""."""

    row: Row
    room: str
    name: str
    entry: str

    @property
    def verb(self) -> str:
        return VERBS.get(self.room.partition("/")[0], "measure")

    @property
    def address(self) -> str:
        return f"{self.room.replace('/', '.')}.{self.name}"


def entry(text: str, key: str) -> str:
    """The entry of a paper in a specification, under `### key (...)` or `**key** (...)`.

    Raises ClaimError, with the entries there are, when there is none.
    """
    headings = [*re.finditer(r"^(?:### ([\w-]+)\b.*|\*\*([\w-]+)\*\* \(.*)$", text, re.MULTILINE)]
    ends = [*(match.start() for match in headings[1:]), len(text)]
    for match, end in zip(headings, ends):
        if key in (match[1], match[2]):
            body = re.split(
                r"^(?:---|#{1,3} )", text[match.end() : end], maxsplit=1, flags=re.MULTILINE
            )[0]
            return body.strip()
    known = ", ".join(match[1] or match[2] for match in headings)
    raise ClaimError(f"That specification has no entry {key!r}; it has {known or 'none at all'}.")


def expected(text: str) -> str:
    """The first expectation of an entry that can be judged, or ""."""
    for expression_text in re.findall(r"`?expect`?:?\s*`?([^`]+?)(?:`|\.\s|\.$|;\s)", text):
        try:
            expression.names(expression_text)
        except ClaimError:
            continue
        return " ".join(expression_text.split())
    return ""


def plan(key: str, spec: str = "", method: str = "") -> Plan:
    """Where a paper's files go. spec: the specification's text. Raises ClaimError when the ledger
    has no such key, or when neither the level nor the specification says where the method
    belongs."""
    row = ledger.row(key)
    text = entry(spec, key) if spec else ""
    if method:
        room, _, name = method.replace(".", "/").rpartition("/")
    elif match := _FILE.search(text):
        shelf = match[1].partition("/")[0] in _SHELVES.split("|")
        room, name = f"architectures/{match[1]}" if shelf else match[1], match[2]
    else:
        room, name = ROOMS.get(row.level, ""), key.replace("-", "_")
    if not room or not name.isidentifier():
        raise ClaimError(
            f"Where does the method of {key} ({row.level}) belong? Say it: --method ROOM.NAME."
        )
    return Plan(row, room, name, text)


def files(plan: Plan) -> dict[Path, str]:
    """Every file by its path from the root of the checkout."""
    stem, room = plan.row.key.replace("-", "_"), plan.room
    return {
        Path("src/stratoscope", room, f"{plan.name}.py"): _method(plan),
        Path("tests", room, f"test_{plan.name}.py"): _test(plan),
        Path("src/stratoscope/papers", f"{stem}.py"): _paper(plan),
        Path("changes", f"{plan.row.key}.md"): f"- {plan.address}: {plan.row.title}.\n",
    }


def write(plan: Plan, root: Path = ROOT) -> list[Path]:
    """Write the files; ClaimError, and none is written, when one of them is there already."""
    made = files(plan)
    if there := [str(path) for path in made if (root / path).exists()]:
        raise ClaimError(f"{', '.join(there)} is there already: nothing was written.")
    for path, text in made.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return list(made)


def _method(plan: Plan) -> str:
    given = _GIVEN[plan.verb]
    imports = "from stratoscope.models.lm import LM\n\n\n" if "LM" in given else "\n"
    return f'''"""{_sentence(plan.row.component)}

Paper: {plan.row.key}

{_wrapped(plan.entry or "The equation, with its axes named.", "    ")}

Reads as: ... Does not show: ... Cost: ...
"""

from __future__ import annotations

from typing import Any

{imports}def {plan.verb}({given}) -> Any:
    """Shapes, units, errors, source."""
    raise NotImplementedError("{plan.address} is not written yet")
'''


def _test(plan: Plan) -> str:
    return f'''"""{plan.address} against a number known beforehand."""

from __future__ import annotations

import pytest

from stratoscope.{".".join(plan.room.split("/"))} import {plan.name}

# how the contract suite calls it: keyword arguments, or a function of a case (docs/add-a-method.md)
EXAMPLE = {_EXAMPLES[plan.verb]}


def test_a_case_done_by_hand() -> None:
    assert callable({plan.name}.{plan.verb})
    pytest.fail("write the closed form or the planted model that the specification names")
'''


def _paper(plan: Plan) -> str:
    expect = expected(plan.entry) or "effect_low > random_bound"
    return f'''"""{plan.row.title}.

AUTHORS, {plan.row.year}. arXiv:NUMBER.
Claim: {_wrapped(plan.row.claim_check, "    ").strip()}
Methods: {plan.address}
Protocol: WHAT WOULD BE RUN ON THE PAPER'S OWN MODELS: WHICH, ON WHAT DATA, HOW MANY.
What would change our mind: THE RESULT THAT WOULD MAKE US TAKE THE WORD BACK.
What the authors may object: WHERE WE DIFFER FROM THEM, AND WHY IT MIGHT MATTER.
"""

from __future__ import annotations

from stratoscope.claims import Measured, claim


@claim(
    says="WHAT THE AUTHORS SAY, ALONE",
    where="SECTION, TABLE, NUMBER",
    read="abstract",
    tier="small",
    subject="{plan.row.needs.split(";")[0].split(",")[0].strip() or "a miniature"}",
    kind="miniature",
    n="40 INDEPENDENT UNITS",
    expect={_literal(expect)},
    null={{"random": "THE NULL THAT COULD REALLY WIN"}},
    thresholds="WHERE EACH NUMBER COMES FROM, AND THE SMALLEST EFFECT THAT WOULD MATTER",
)
def name_of_the_claim(seed: int) -> Measured:
    """How it is measured here."""
    raise NotImplementedError("{plan.row.key} is not measured yet")
'''


def _literal(text: str) -> str:
    """Python source of a text, on lines of at most 100 columns."""
    if len(text) < 70:
        return f'"{text}"'
    parts = textwrap.wrap(text, 80, drop_whitespace=False)
    return "(\n" + "\n".join(f'        "{part}"' for part in parts) + "\n    )"


def _sentence(text: str) -> str:
    first = text.split(". ")[0].rstrip(".") + "."
    return _wrapped(first, "").strip()


def _wrapped(text: str, indent: str) -> str:
    lines = text.replace("\\", "\\\\").replace('"""', "'''").splitlines()
    return "\n".join(
        textwrap.fill(line.strip(), 96, initial_indent=indent, subsequent_indent=indent)
        for line in lines
        if line.strip()
    )


@click.command(help=__doc__)
@click.argument("key")
@click.option(
    "--spec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The specification's file.",
)
@click.option(
    "--method", default="", help="ROOM.NAME, where the ledger and the specification do not say it."
)
def main(key: str, spec: Path | None, method: str) -> None:
    try:
        made = write(plan(key, spec.read_text(encoding="utf-8") if spec else "", method))
    except StratoscopeError as error:
        raise click.ClickException(str(error)) from error
    for path in made:
        click.echo(path)


if __name__ == "__main__":
    main()
