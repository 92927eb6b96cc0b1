"""Small enough to read: lines per method file and per function, and the public names of LM."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from stratoscope import catalogue
from support import seconds

SOURCE = Path(__file__).parents[1] / "src" / "stratoscope"
# LM shows what the house asks it, so that methods need not reach through `lm.layout`: 14 names
# today
METHOD_STATEMENTS, FUNCTION_STATEMENTS = 115, 40  # width cannot buy these
METHOD_LINES, MODEL_LINES, FUNCTION_LINES, LM_LINES, LM_NAMES = 255, 300, 80, 300, 16


def count_lines(text: str) -> int:
    return len(text.splitlines())


def count_statements(node: ast.AST) -> int:
    """Statements below `node`; a docstring is none."""
    found = [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node]
    texts = [s for s in found if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    return len(found) - len(texts)


def functions(text: str) -> dict[str, tuple[int, int]]:
    """Statements and lines of every function in `text`, nested ones and methods included."""
    return {
        f"{node.name} (line {node.lineno})": (
            count_statements(node),
            (node.end_lineno or node.lineno) - node.lineno + 1,
        )
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def public_names(text: str, name: str) -> set[str]:
    """Return what class `name` shows: methods, class attributes, and what its methods set on
    `self`."""
    [body] = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    found = {
        node.name
        for node in body.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in ast.walk(body):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            found.add(node.attr)
    for node in body.body:
        for target in (
            node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        ):
            found |= (
                {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)}
                if target
                else set()
            )
    return {word for word in found if not word.startswith("_")}


def over(sizes: dict[str, int], limit: int) -> list[str]:
    """Return the ten worst above `limit`, as lines to print."""
    worst = sorted(((size, what) for what, size in sizes.items() if size > limit), reverse=True)
    return [f"{size} > {limit}: {what}" for size, what in worst[:10]]


def test_method_files() -> None:
    texts = {entry.address: entry.path.read_text("utf-8") for entry in catalogue.methods()}
    lines = {name: count_lines(text) for name, text in texts.items()}
    models = {name: lines.pop(name) for name in texts if name.startswith("architectures.")}
    assert over(lines, METHOD_LINES) == []
    assert over(models, MODEL_LINES) == []
    statements = {name: count_statements(ast.parse(texts[name])) for name in lines}
    assert over(statements, METHOD_STATEMENTS) == []


def test_functions() -> None:
    sizes = {
        f"{path.relative_to(SOURCE)}: {what}": size
        for path in SOURCE.rglob("*.py")
        for what, size in functions(path.read_text("utf-8")).items()
    }
    assert len(sizes) > 20  # the folder was really read
    assert over({what: n for what, (n, _) in sizes.items()}, FUNCTION_STATEMENTS) == []
    assert over({what: n for what, (_, n) in sizes.items()}, FUNCTION_LINES) == []


def test_lm_is_small() -> None:
    text = (SOURCE / "models" / "lm.py").read_text("utf-8")
    assert count_lines(text) <= LM_LINES
    names = public_names(text, "LM")
    assert len(names) <= LM_NAMES, sorted(names)


def test_planted_violations_are_caught() -> None:
    long = 'def f():\n    """Says."""\n' + "    x = (\n        1)\n" * 60
    assert functions(long) == {"f (line 1)": (60, 122)}
    assert over({"f": 60}, 59) == ["60 > 59: f"]
    assert over({"f": 60}, 60) == []
    assert functions("class A:\n    async def g(self):\n        def h(): ...\n") == {
        "g (line 2)": (1, 2),
        "h (line 3)": (0, 1),
    }
    assert len(over({str(i): i for i in range(100)}, 10)) == 10
    assert over({"small": 11, "big": 99}, 10)[0] == "99 > 10: big"
    assert count_lines("a\n" * 201) == 201


def test_public_names_are_all_counted() -> None:
    text = """
class Other:
    z = 1
class LM:
    a: int
    b = c = 1
    _hidden = 2
    def __init__(self, x):
        self.d, self._e = x, x
        x.not_mine = 1
    @property
    def f(self): ...
    def g(self):
        local = 3
        self.h: int = local
"""
    assert public_names(text, "LM") == set("abcdfgh")
    with pytest.raises(ValueError, match="not enough values"):
        public_names(text, "Missing")


def test_what_is_committed_stays_small() -> None:
    """243 papers must not make a checkout heavy: no long text but the ledger, no large picture."""
    root = SOURCE.parents[1]
    files = [
        p
        for top in ("src", "docs", "tests", "bench")
        for p in (root / top).rglob("*")
        if p.is_file()
    ]
    kept = [p for p in files if "__pycache__" not in p.parts and not p.name.startswith(".")]
    sizes = {
        str(path.relative_to(root)): path.stat().st_size
        for path in kept
        if path.name != "ledger.tsv"
    }
    pictures = {name: size for name, size in sizes.items() if name.endswith(".png")}
    assert over(pictures, 150_000) == []
    # a paper's verdicts grow with its seeds and models: each of them is short
    kept_for_good = {name for name in sizes if "/papers/verdicts/" in name}
    lines = {
        f"{name}:{number}": len(line)
        for name in kept_for_good
        for number, line in enumerate((root / name).read_text("utf-8").splitlines(), 1)
    }
    # half of a verdict are the names and digests of the hundred modules that it reached
    assert over(lines, 10_000) == []
    others = {n: size for n, size in sizes.items() if n not in pictures and n not in kept_for_good}
    assert over(others, 60_000) == []
    figures = [size for name, size in sizes.items() if name.startswith("docs/papers/figures/")]
    assert sum(figures) / len(figures) < 8_000


# Of CPU, of what `make test` runs. 1,200 are ten minutes on two quiet cores.
FILE_SECONDS, CONTRACT_SECONDS, ALL_SECONDS = 60, 300, 1200


def dear(table: dict[str, float]) -> list[str]:
    """What of a table of seconds by test file is too dear."""
    contract = "tests/test_contract.py"
    files = {file: round(spent) for file, spent in table.items() if file != contract}
    faults = over(files, FILE_SECONDS) + over({contract: round(table[contract])}, CONTRACT_SECONDS)
    return faults + over({"all test files": round(sum(table.values()))}, ALL_SECONDS)


def test_the_tests_are_cheap() -> None:
    """As recorded: `pytest --record-seconds FILES` writes the new numbers of these files."""
    table = seconds.read()
    assert [file for file in table if not (seconds.ROOT / file).is_file()] == []
    assert dear(table) == []


def test_a_dear_test_file_is_seen() -> None:
    contract = {"tests/test_contract.py": 100.0}
    assert dear(contract | {"tests/test_a.py": 59.0}) == []
    assert dear(contract | {"tests/test_a.py": 61.0}) == ["61 > 60: tests/test_a.py"]
    assert dear({"tests/test_contract.py": 301.0}) == ["301 > 300: tests/test_contract.py"]
    assert dear(contract | {f"tests/test_{n}.py": 50.0 for n in range(23)}) == [
        "1250 > 1200: all test files"
    ]
