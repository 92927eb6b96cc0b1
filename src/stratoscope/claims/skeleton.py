"""A new paper's files, begun from its row of the ledger and its entry in a specification.

    make new KEY=... [SPEC=file] [METHOD=ROOM.NAME]
    python -m stratoscope.claims.skeleton KEY [--spec FILE] [--method ROOM.NAME]

Four files that pass the linter and fail their test until they are written: the method, its test,
the paper, a line for the changelog. What a specification says of the mechanism begins the method's
docstring, what it says of claims the paper's, to be replaced by what was built. The registration,
the verdicts and the page come later, by the commands that are printed. No file that exists is
touched.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import click

from stratoscope.claims import ledger, specification
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
_GIVEN = {
    "edit": "lm: LM, request: Any", "build": "config: Any", "items": "seed: int",
    "measure": "lm: LM, inputs: Any", "fit": "lm: LM, inputs: Any",
}  # fmt: skip

_NEXT = """
Next: write them (docs/add-a-method.md), then
  .venv/bin/python -m pytest {test} && make test-changed
  make pages                                     the paper's page; commit all of it, then
  .venv/bin/stratoscope claim {key} --register   what is expected; commit, then
  .venv/bin/stratoscope claim {key}              measure"""

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

    @property
    def others(self) -> list[str]:
        """Every method that the entry names, by its address."""
        places = specification.places(self.entry)
        return [f"{room.replace('/', '.')}.{name}" for room, name in places]


def plan(key: str, spec: str = "", method: str = "") -> Plan:
    """Where a paper's files go. spec: the specification's text. Raises ClaimError when the ledger
    has no such key, or when neither the level nor the specification says where the method
    belongs."""
    row = ledger.row(key)
    text = specification.entry(spec, key) if spec else ""
    if method:
        room, _, name = method.replace(".", "/").rpartition("/")
    elif named := specification.places(text):
        room, name = named[0]
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

{_wrapped(specification.of_method(plan.entry) or "The equation, with its axes named.", "    ")}

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
    said = _wrapped(specification.of_claims(plan.entry), "")
    small = specification.small(plan.entry)
    real = specification.on_a_real_model(f"{plan.row.needs} {small}")
    typed = "from stratoscope.models import LM\n" if real else ""
    return f'''"""{plan.row.title}.

AUTHORS, {plan.row.year}. arXiv:NUMBER.
Claim: {_wrapped(plan.row.claim_check, "    ").strip()}
Methods: {plan.address}
Protocol: WHAT WOULD BE RUN ON THE PAPER'S OWN MODELS: WHICH, ON WHAT DATA, HOW MANY.
What would change our mind: THE RESULT THAT WOULD MAKE US TAKE THE WORD BACK.
What the authors may object: WHERE WE DIFFER FROM THEM, AND WHY IT MIGHT MATTER.
{f"{chr(10)}{said}{chr(10)}" if said else ""}"""

from __future__ import annotations

from stratoscope.claims import Measured, claim
{typed}

{_identity(plan)}

{_small(plan, small, real=real)}'''


def _identity(plan: Plan) -> str:
    known = specification.expected(specification.identity(plan.entry))
    return f'''@claim(
    says="WHAT MUST BE SO WHERE THE ANSWER IS KNOWN",
    where="THE EQUATION, OR WHERE THE PAPER RELIES ON IT",
    tier="identity",
    subject="A PLANTED MODEL, OR RANDOM SAMPLES",
    expect={_literal(known or "found < 0.000001 and wrong > 0.01")},
    null={{"wrong": "THE WRONG VARIANT THAT MUST BE CAUGHT"}},
)
def what_is_known_is_found(seed: int) -> Measured:
    """How it is measured, in less than three seconds."""
    raise NotImplementedError("{plan.row.key} is not measured yet")
'''


def _small(plan: Plan, said: str, *, real: bool) -> str:
    name = specification.name(said) or "name_of_the_claim"
    expect = specification.expected(said) or "effect_low > random_bound"
    direction = specification.expected(said, "direction") or "effect > random"
    own = plan.row.needs.split(";")[0].split(",")[0].strip() or "a miniature"
    if real:
        subject, given = 'subjects=("smollm2", "gemma3-270m"),', "lm: LM, seed: int"
    else:
        subject, given = f'subject="{own}",\n    kind="miniature",', "seed: int"
    return f'''@claim(
    says="WHAT THE AUTHORS SAY, ALONE",
    where="SECTION, TABLE, NUMBER",
    read="abstract",
    tier="small",
    {subject}
    n="40 INDEPENDENT UNITS",
    valid="accuracy > 0.5",
    expect={_literal(expect)},
    direction={_literal(direction)},
    null={{"random": "THE NULL THAT COULD REALLY WIN"}},
    thresholds="WHERE EACH NUMBER COMES FROM, AND THE SMALLEST EFFECT THAT WOULD MATTER",
)
def {name}({given}) -> Measured:
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
        planned = plan(key, spec.read_text(encoding="utf-8") if spec else "", method)
        made = write(planned)
    except StratoscopeError as error:
        raise click.ClickException(str(error)) from error
    for path in made:
        click.echo(path)
    if others := [name for name in planned.others if name != planned.address]:
        click.echo(f"The specification names more, to be added by hand: {', '.join(others)}.")
    click.echo(_NEXT.format(test=made[1], key=key))


if __name__ == "__main__":
    main()
