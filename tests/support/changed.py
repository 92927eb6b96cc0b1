"""The test files that a change can reach: `make test-changed`.

    python tests/support/changed.py [BASE] | xargs python -m pytest

Prints the arguments for pytest: of what has changed since this branch left BASE (main).

Imports are read from the text of the files (also those inside functions, and the addresses of
methods in quotes, since those are reached through the catalogue), and followed upward: a test runs
when anything that it imports, at any distance, has changed. A `conftest.py`, `pyproject.toml` or
this file reaches everything; a new or changed method reaches the contract suite's cases of it; a
paper, a task or a data set reaches the test that lists its folder; models/ and engine/ reach the
nightly families too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVERYTHING = re.compile(r"(^|/)conftest\.py$|^pyproject\.toml$|^tests/support/(changed|skips)\.py$")
# rooms in which every family must be proved anew
DEEP = re.compile(r"^src/stratoscope/(models|engine)/")
# they read the tree, not modules: a few seconds together
GUARDS = ("tests/test_arrows.py", "tests/test_budgets.py", "tests/test_docs.py")
CONTRACT = "tests/test_contract.py"
# what is found by listing its folder, and imported by nobody: the tests that read it
LISTED = {
    r"src/stratoscope/papers/|docs/papers/": ("claims/test_papers", "claims/test_pages"),
    r"src/stratoscope/lab/(\w+)/": (r"lab/test_\1",),
    r"docs/guide/": ("test_guide",),
}
# the suites that run every method of the catalogue, and where they learn how
ALL_METHODS = (CONTRACT, "tests/test_devices.py", "tests/test_half_precision.py")
ALL_METHODS = (*ALL_METHODS, "tests/test_not_a_number.py", "tests/test_whole_answers.py")


def module_of(path: str) -> str:
    """`src/stratoscope/engine/sweep.py` -> `stratoscope.engine.sweep`; a test by its own path."""
    parts = Path(path).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("src", "tests") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(text: str, module: str, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports, or names in quotes as `room.method`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+", str(node.value)):
            names |= {str(node.value), f"stratoscope.{node.value}"}
    # `import a.b.c` runs a and a.b too; the package itself imports everything lazily, and is left
    parents = {".".join(name.split(".")[:n]) for name in names for n in range(2, 9)} | names
    return parents & (modules - {"stratoscope"})


def graph(files: dict[str, str]) -> dict[str, set[str]]:
    """Path -> paths that it imports, from the texts of all Python files by path."""
    paths = {module_of(path): path for path in files}
    return {
        path: {paths[name] for name in imported(text, module_of(path), set(paths))} - {path}
        for path, text in files.items()
    }


def reached(changed: Iterable[str], imports: dict[str, set[str]]) -> set[str]:
    """The changed files, and all that import them at any distance."""
    above: dict[str, set[str]] = {}
    for path, below in imports.items():
        for one in below:
            above.setdefault(one, set()).add(path)
    found, waiting = set(changed), list(changed)
    while waiting:
        fresh = above.get(waiting.pop(), set()) - found
        found |= fresh
        waiting += fresh
    return found


def selected(changed: Iterable[str], files: dict[str, str], methods: set[str]) -> list[str]:
    """The arguments of pytest for these changed paths.

    files: the text of every Python file under src/ and tests/, by path. methods: the paths of the
    catalogue's methods.
    """
    changed = sorted(changed)
    tests = sorted(path for path in files if re.search(r"(^|/)test_\w+\.py$", path))
    deep = ["-m", ""] if any(DEEP.match(path) for path in changed) else []
    if any(EVERYTHING.search(path) for path in changed):
        return [*deep, "tests"]
    found = reached(changed, graph(files))
    found |= {path for path in GUARDS if path in tests and changed}
    found |= {path for path in tests for one in changed if path in _listing(one)}
    run = [path for path in tests if path in found]
    suites = [path for path in ALL_METHODS if path in tests]
    direct = {path for path in changed if path in suites or path.startswith("tests/support/")}
    addresses = {module_of(path).removeprefix("stratoscope.") for path in found & methods}
    addresses |= {a for path in found if (a := _tested(path, methods))}
    if direct:
        return [*deep, *run]
    run = [path for path in run if path not in suites]
    if len(addresses) == len(methods) or deep:
        return [*deep, *sorted({*run, *suites})] if addresses else [*deep, *run]
    cases = [f"--method={address}" for address in sorted(addresses)]
    return [*deep, *sorted({*run, *(suites if addresses else [])}), *cases]


def _listing(path: str) -> set[str]:
    """The tests that find a path by listing its folder, or read it as text."""
    return {
        f"tests/{match.expand(test)}.py"
        for pattern, names in LISTED.items()
        if (match := re.match(pattern, path))
        for test in names
    }


def _tested(path: str, methods: set[str]) -> str:
    """The method whose own test a path is, or ""."""
    if not (match := re.fullmatch(r"tests/([\w/]+)/test_(\w+)\.py", path)):
        return ""
    source = f"src/stratoscope/{match[1]}/{match[2]}.py"
    return module_of(source).removeprefix("stratoscope.") if source in methods else ""


def _git(*arguments: str) -> list[str]:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def left(base: str) -> str:
    """The commit where this branch left `base`, or the base of the clone it came from; "" where
    there is neither."""
    for name in (base, f"origin/{base}"):
        try:
            return _git("merge-base", name, "HEAD")[0]
        except subprocess.CalledProcessError:
            continue
    return ""


def main(base: str = "main") -> None:
    from stratoscope import catalogue

    start = left(base)
    if not start:  # a clone of one branch
        text = f"There is no {base} here to compare with: all tests run."
        print(text, file=sys.stderr)  # noqa: T201
        print("tests")  # noqa: T201
        return
    changed = {*_git("diff", "--name-only", start), *_git("ls-files", "-o", "--exclude-standard")}
    paths = [path for top in ("src", "tests") for path in (ROOT / top).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}
    methods = {entry.path.relative_to(ROOT).as_posix() for entry in catalogue.methods()}
    words = [word or repr(word) for word in selected(changed, files, methods)]
    print(*words)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
