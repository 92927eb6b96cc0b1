"""Who may import whom: the arrows between the rooms, read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "stratoscope"
BASE = {"store", "models", "engine", "results", "maths", "errors"}
SHOW = {"store", "results", "catalogue", "plots", "report", "errors"}
ALLOWED = {
    "errors": set(),
    "_lazy": set(),
    "_threads": set(),
    "__main__": {"cli"},
    "": set(),  # stratoscope/__init__.py
    "catalogue": {"errors"},
    "maths": {"errors"},
    "store": {"errors"},
    "models": {"store", "errors"},
    "engine": {"store", "models", "maths", "errors"},
    "results": {"maths", "errors"},
    "lab": BASE,
    "benchmarks": BASE,
    "plots": SHOW,
    "claims": SHOW - {"report"} | {"maths", "models"},
    "report": SHOW | {"claims"},
}
ONLY_AS_TYPES = {"": {"models", "engine", "report"}, "plots": {"models"}, "report": {"models"}}
# these see everything; cli and workbench reach methods through the catalogue
TOP = {"cli", "papers", "workbench"}


def rooms(root: Path = SOURCE) -> set[str]:
    return {path.parent.name for path in root.glob("*/__init__.py")}


def method_rooms() -> set[str]:
    return rooms() - set(ALLOWED) - TOP


def imports(text: str, package: tuple[str, ...]) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted name, line, only for types) of each stratoscope import in a file of
    `package`."""
    tree = ast.parse(text)
    types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [
                ".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names
            ]
        else:
            continue
        yield from (
            (name, node.lineno, node in types)
            for name in names
            if name.split(".")[0] == "stratoscope"
        )


def violations(text: str, package: tuple[str, ...], room: str, methods: set[str]) -> list[str]:
    """Return one line per import of `text` that room `room` may not make."""
    found = []
    for name, line, only_types in imports(text, package):
        target = name.split(".")[1] if "." in name else ""
        if room in methods and name.endswith(".measure"):
            found.append(f"line {line}: {name} is imported bare; call it through its module")
        if target in (room, "_lazy", "_threads"):
            fine = target != ""
        elif room in methods:
            fine = target in BASE
        elif room in ("cli", "workbench"):
            fine = target not in methods
        elif room == "papers":
            fine = target not in ("cli", "workbench", "")
        else:
            fine = target in ALLOWED[room] or (only_types and target in ONLY_AS_TYPES.get(room, ()))
        if not fine:
            found.append(f"line {line}: {room or 'the root'} imports {name}")
    return found


def files() -> list[tuple[Path, tuple[str, ...], str]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        room = "" if parts == ("__init__",) else parts[0]
        found.append((path, ("stratoscope", *parts[:-1]), room))
    return found


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file[0].relative_to(SOURCE)))
def test_arrows(file: tuple[Path, tuple[str, ...], str]) -> None:
    path, package, room = file
    assert violations(path.read_text("utf-8"), package, room, method_rooms()) == []


def test_every_room_is_known() -> None:
    """A method room has a method or is named in the design; a new kind of room needs its own arrows
    above."""
    designed = {"tokens", "embeddings", "neurons", "features", "heads", "layers", "circuits"}
    designed |= {"editing", "retrieval", "vision", "architectures", "training"}
    assert method_rooms() <= designed


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("models", "from stratoscope.engine import trace"),
        ("models", "from ..engine import trace"),
        ("models", "import stratoscope"),
        ("models", "def f():\n    from stratoscope import results"),
        ("engine", "from stratoscope.results import label"),
        ("results", "import stratoscope.models"),
        ("maths", "from stratoscope.models import LM"),
        ("store", "from stratoscope.models import LM"),
        ("store", "from stratoscope.lab import data"),
        ("layers", "from stratoscope.heads import roles"),
        ("layers", "from stratoscope.plots import heatmap"),
        ("layers", "from stratoscope.layers.logit_lens import measure"),
        ("layers", "from .logit_lens import measure as m"),
        ("lab", "from stratoscope.layers import logit_lens"),
        ("plots", "from stratoscope.models import LM"),
        ("plots", "from stratoscope.engine import trace"),
        ("plots", "from stratoscope.claims import ledger"),
        ("claims", "from stratoscope.engine.sweep import sweep"),
        ("claims", "from stratoscope.lab import data"),
        ("claims", "from stratoscope.layers import logit_lens"),
        ("claims", "from stratoscope.report import page"),
        ("layers", "from stratoscope.claims import claim"),
        ("cli", "from stratoscope.layers import logit_lens"),
        ("", "from stratoscope.models import load"),
        ("papers", "from stratoscope import cli"),
    ],
)
def test_a_planted_violation_is_caught(room: str, text: str) -> None:
    assert violations(
        text, ("stratoscope", room) if room else ("stratoscope",), room, {"layers", "heads"}
    )


@pytest.mark.parametrize(
    ("room", "text"),
    [
        (
            "models",
            "from stratoscope.models.sites import Site\nfrom stratoscope._lazy import lazy\nimport "
            "torch",
        ),
        ("models", "from .sites import Site"),
        (
            "layers",
            "from stratoscope.engine import trace\nfrom stratoscope.layers import logit_lens",
        ),
        ("layers", "from stratoscope.results import label"),
        (
            "plots",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stratoscope.models "
            "import LM",
        ),
        (
            "cli",
            "import stratoscope\nfrom stratoscope import catalogue\nfrom stratoscope.report import "
            "page",
        ),
        (
            "papers",
            "from stratoscope.layers import logit_lens\nfrom stratoscope.claims import Measured, "
            "claim",
        ),
        ("claims", "from stratoscope import catalogue\nfrom stratoscope.plots import bars"),
        ("report", "from stratoscope.claims import ledger"),
    ],
)
def test_what_is_allowed_passes(room: str, text: str) -> None:
    assert violations(text, ("stratoscope", room), room, {"layers", "heads"}) == []


def test_one_place_writes_tensors() -> None:
    """`store/tensors.py` knows how a file is written in one step and refused by name; a second copy
    would not."""
    words = ("from safetensors.torch", "safe_open", "torch.save(", "pickle.dump")
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in words)
    }
    # lm-eval reads its steering file, and tuned-lens its lenses, as a pickle, and nothing else; a
    # merge reads the folders of whole models, of any size, tensor by tensor
    others = {"editing/control_vectors.py", "editing/_merge_files.py", "layers/_tuned.py"}
    assert found == {"store/tensors.py"} | others
