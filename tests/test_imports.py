"""`import stratoscope` is quick, loads no heavy package, and opens its rooms when they are
named."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stratoscope
from stratoscope._lazy import lazy

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "xarray",
    "scipy",
    "sklearn",
    "plotly",
    "jaxtyping",
    "rich",
    "click",
)


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_the_standard_library_and_itself_alone() -> None:
    """What makes an import slow is what it loads; milliseconds would measure the machine's other
    work."""
    loaded = run(
        "import sys; before = set(sys.modules)\nimport stratoscope\nprint(*set(sys.modules) - "
        "before)"
    ).split()
    foreign = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert foreign == {"stratoscope"}
    assert len(loaded) < 40  # `typing` and what it needs


@pytest.mark.parametrize(
    "statement",
    ["import stratoscope", "import stratoscope, stratoscope.catalogue as c; c.methods()"],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    loaded = run(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert "stratoscope" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_rooms_open_when_named() -> None:
    assert (
        run(
            "import stratoscope, sys\n"
            "assert 'stratoscope.results' not in sys.modules\n"
            "print(stratoscope.results.AXES['rank'])\n"
            "print(stratoscope.errors.ResultError.__name__)"
        )
        == "a place in a sorted list, 0 is best\nResultError\n"
    )


def test_rooms_are_listed() -> None:
    assert {"models", "results", "layers", "heads", "load", "wrap", "catalogue"} <= set(
        dir(stratoscope)
    )
    assert "_lazy" not in dir(stratoscope)


def test_a_misspelled_room_gets_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"stratoscope has no 'layer'; nearest: layers"):
        stratoscope.layer  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"stratoscope.layers has no 'nothing_like_it'; nearest:"
    ):
        stratoscope.layers.nothing_like_it  # noqa: B018
    assert not hasattr(stratoscope, "__wrapped__")


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert stratoscope.__version__ == version("stratoscope")


def test_lazy_reads_the_folder_each_time(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "planted_package"
    package.mkdir()
    source = (
        "from stratoscope._lazy import lazy\n__getattr__, __dir__ = lazy(__name__, __path__, "
        "sqrt='math')\n"
    )
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import planted_package

    assert dir(planted_package) == ["sqrt"]
    (package / "later.py").write_text("value = 3")
    assert dir(planted_package) == ["later", "sqrt"]
    assert planted_package.later.value == 3
    assert planted_package.sqrt(4) == 2
    with pytest.raises(AttributeError, match="planted_package has no 'latter'; nearest: later"):
        planted_package.latter  # noqa: B018


def test_lazy_lets_a_broken_file_speak() -> None:
    """A missing optional package must not look like a missing method."""
    get, _ = lazy("stratoscope", [], load="package_that_is_not_installed")
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_installed"):
        get("load")


def test_annotations_are_checked_in_this_test_run() -> None:
    """The hook of conftest.py is on: without it, wrong shapes would pass every test."""
    from beartype.roar import BeartypeCallHintParamViolation

    from stratoscope import catalogue

    with pytest.raises(BeartypeCallHintParamViolation, match="address"):
        catalogue.find(3)


def test_every_file_beside_the_code_is_in_the_wheel() -> None:
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    packed = settings["package-data"]["stratoscope"]
    source = root / "src" / "stratoscope"
    files = [
        p.relative_to(source)
        for p in source.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    ]
    beside = [p for p in files if p.suffix not in (".py", ".pyc")]
    assert len(beside) > 10
    assert [str(p) for p in beside if not any(p.match(pattern) for pattern in packed)] == []
