"""The catalogue finds methods by reading files, and reads them as Python would."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from stratoscope import catalogue
from stratoscope.errors import MethodError

METHOD = '''"""The lens.

Paper: logit-lens

    def edit(  # shown, not defined
"""

from __future__ import annotations

TEXT = """
def fit(
"""


def helper(x):
    def build(y): ...


def measure(lm, inputs, *, rank=1):
    raise RuntimeError("the catalogue runs nothing")


raise RuntimeError("the catalogue imports nothing")
'''


TWO = """# a comment
r'''Two verbs.

Paper: rome, and others
'''
def edit(lm): ...
def fit(lm): ...
"""


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return root


def test_scan_of_a_folder(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        {
            "layers/lens.py": METHOD,
            "layers/_private.py": METHOD,
            "layers/helpers.py": '"""No verb."""\ndef measured(): ...\nclass A:\n    def '
            "fit(self): ...\n",
            "editing/two.py": TWO,
            "editing/bare.py": "def build(config): ...\n",
            "engine/sweep.py": METHOD,
            "models/m.py": METHOD,
        },
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "n.py").write_text(METHOD)  # no package
    assert catalogue.methods(root) == [
        catalogue.Entry("editing", "bare", ("build",), "", "", root / "editing/bare.py"),
        catalogue.Entry(
            "editing", "two", ("fit", "edit"), "Two verbs.", "rome", root / "editing/two.py"
        ),
        catalogue.Entry(
            "layers", "lens", ("measure",), "The lens.", "logit-lens", root / "layers/lens.py"
        ),
    ]
    assert catalogue.find("layers.lens", root).address == "layers.lens"


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("layers.lenz", "Nearest: layers.lens"),
        ("heads.lens", "Nearest: layers.lens"),
        ("lens", "Nearest: layers.lens"),
        ("q", "`stratoscope methods`"),
    ],
)
def test_unknown_names_get_the_nearest(asked: str, answer: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=f"There is no method '{asked}' among 1. {answer}"):
        catalogue.find(asked, make(tmp_path, {"layers/lens.py": METHOD}))


def test_this_package_is_read_as_python_reads_it() -> None:
    """Every entry against the syntax tree, and no method of the tree is missed."""
    found = {entry.path: entry for entry in catalogue.methods()}
    for path in catalogue.ROOT.glob("*/[!_]*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        verbs = defined & {"measure", "fit", "edit", "build"}
        if path.parent.name in catalogue.OTHER_ROOMS:
            assert path not in found
        else:
            assert set(found[path].verbs if path in found else ()) == verbs
        assert (
            catalogue.docstring(path.read_text("utf-8"))
            == (ast.get_docstring(tree, clean=False) or "").strip()
        )


def test_every_method_imports_and_has_its_verbs() -> None:
    for entry in catalogue.methods():
        module = catalogue.module(entry.address)
        assert all(callable(getattr(module, verb)) for verb in entry.verbs)
        assert entry.summary.endswith("."), (
            f"{entry.address}: the first docstring line is one sentence"
        )


def test_two_hundred_files_take_less_than_150_ms(tmp_path: Path) -> None:
    # about 150 lines
    body = "\n\n".join(f"def helper_{i}(x):\n    return x + {i}" for i in range(35))
    make(tmp_path, {f"layers/m{i}.py": f"{METHOD}\n{body}" for i in range(200)})
    times = []
    for _ in range(3):
        start = time.process_time()  # not the wall's: other work may share the machine
        assert len(catalogue.methods(tmp_path)) == 200
        times.append(time.process_time() - start)
    assert min(times) < 0.15
