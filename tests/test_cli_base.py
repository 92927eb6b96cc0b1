"""The command line: quick help, one-paragraph errors, and `methods` and `measure` on a planted
room."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import stratoscope
from stratoscope import catalogue, cli
from stratoscope.cli.measure import read_inputs
from stratoscope.errors import InputError
from stratoscope.results import load

METHOD = '''\
"""Counts the words of each prompt, [not markup] and says so in words longer than a line.

Paper: counting-words
"""

from __future__ import annotations

from stratoscope.errors import InputError
from stratoscope.results import label


def measure(
    lm,
    inputs: list[str],
    *,
    answer: str | None = None,
    scale: float = 1.0,
    ranks: list[int] | None = None,
):
    if answer == "refuse":
        raise InputError("The answer was refused.\\nGive another one, " + "please " * 20)
    if answer == "break":
        raise RuntimeError("a fault")
    if answer == "stop":
        raise KeyboardInterrupt
    counts = [scale * len(text.split()) for text in inputs]
    settings = {"answer": answer, "ranks": ranks}
    origin = {"model": lm, "versions": {"torch": "2.13"}}
    return label(counts, "example", name="words", method="count", settings=settings,
    provenance=origin)
'''
EDIT = '"""Edits."""\ndef edit(lm, request, *, strength): ...\n'
NEEDS = '"""Needs two options."""\ndef measure(lm, inputs, *, answer, foil, rank=1): ...\n'
SWEEP = '''"""Two steps, one a run: what is finished is kept in `save`."""
from stratoscope.results import label


def measure(lm, inputs, *, save=None, progress=None):
    done = int(save.read_text()) if save and save.exists() else 0
    progress(done + 1, 2)
    if save:
        save.write_text(str(done + 1))
    if done + 1 < 2:
        raise KeyboardInterrupt
    return label([done], "example", name="steps", method="sweep")
'''


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A room of four methods, seen by the catalogue and importable as stratoscope.planted_room."""
    room = tmp_path / "source" / "planted_room"
    room.mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "count": METHOD,
        "change": EDIT,
        "needs": NEEDS,
        "sweep": SWEEP,
    }.items():
        (room / f"{name}.py").write_text(text)
    monkeypatch.setattr(catalogue, "ROOT", room.parent)
    monkeypatch.setattr(stratoscope, "__path__", [*stratoscope.__path__, str(room.parent)])
    monkeypatch.setitem(stratoscope.__dict__, "load", lambda name, device: f"loaded {name}")
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("stratoscope.planted_room")]:
        del sys.modules[name]
    stratoscope.__dict__.pop("planted_room", None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def measure(*more: str, method: str = "planted_room.count") -> Result:
    return run(
        "measure", method, "--model", "tiny", "--prompt", "one two three", "--prompt", "four", *more
    )


def test_help_imports_no_command_and_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['stratoscope', '--help']\n"
        "from stratoscope.cli import main\n"
        "try: main()\n"
        "finally: print(*[n for n in sys.modules if n.startswith(('stratoscope.cli.', 'torch', "
        "'numpy', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\n"), "a command's file was imported"
    assert "Run one measuring method on a model" in done.stdout


def test_every_file_is_a_command_with_help() -> None:
    for path in cli.FOLDER.glob("[!_]*.py"):
        result = run(path.stem.replace("_", "-"), "--help")
        assert result.exit_code == 0
        assert catalogue.summary(path.read_text("utf-8")) in " ".join(result.output.split())


def test_unknown_command_gets_the_nearest() -> None:
    result = run("mesure")
    assert result.exit_code == 2
    assert "There is no command 'mesure'. Did you mean measure" in result.stderr
    assert "The commands are" in run("qqq").stderr


def test_methods_fits_80_columns() -> None:
    result = run("methods")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "planted_room" in result.output
    assert "[not markup]" in result.output
    assert "paper: counting-words" in result.output
    assert "in words longer than a line." in " ".join(result.output.split())
    assert run("methods", "planted_room").output == result.output
    assert "The rooms are planted_room." in " ".join(run("methods", "kitchen").stderr.split())


def test_measure_shows_and_saves(tmp_path: Path) -> None:
    result = measure(
        "--set", "scale=2", "--set", "ranks=[1, 2]", "--set", "answer= 42", "--out", "words.nc"
    )
    assert result.exit_code == 0, result.stderr
    assert "array([6., 2.])" in result.output
    assert "model: loaded tiny" in result.output
    assert "versions: torch 2.13" in result.output
    assert "Saved to words.nc" in result.output
    saved = load(tmp_path / "words.nc")
    assert saved.values.tolist() == [6.0, 2.0]
    assert saved.attrs["settings"] == '{"answer": " 42", "ranks": [1, 2]}'


def test_measure_draws_and_saves_in_the_format_of_the_ending(tmp_path: Path) -> None:
    asked = ("--set", "scale=2", "--set", "ranks=[1, 2]")
    drawn = measure(*asked, "--out", "words.csv").output
    assert "█" in drawn[: drawn.index("array([6., 2.])")]
    lines = (tmp_path / "words.csv").read_text().splitlines()
    assert [float(line.split(",")[-1]) for line in lines[1:]] == [6.0, 2.0]
    measure(*asked, "--out", "words.json")
    data = json.loads((tmp_path / "words.json").read_text())
    assert data["data"] == [6.0, 2.0]
    for ending in ("svg", "html"):
        measure(*asked, "--out", f"words.{ending}")
        assert "svg" in (tmp_path / f"words.{ending}").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "scal=2"],
            "has no option 'scal'. Did you mean scale? Its options: answer, scale, ranks.",
        ),
        (["--set", "scale=big"], "Option scale takes float, and got 'big'."),
        (["--set", "scale"], "--set takes KEY=VALUE, and got 'scale'."),
        (["--out", "none/words.nc"], "The folder of none/words.nc does not exist."),
        (["--save", "sweep.pt"], "planted_room.count is no sweep that could be resumed"),
        (["--set", "answer=refuse"], "The answer was refused. Give another one, please"),
    ],
)
def test_measure_refuses_in_one_paragraph(arguments: list[str], message: str) -> None:
    result = measure(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert "\n\n" not in result.stderr
    assert max(map(len, result.stderr.splitlines())) <= 100


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("planted_room.cuont", "Nearest: planted_room.count"),
        ("planted_room.change", "does not measure: it can only edit."),
        ("planted_room.needs", "needs answer, foil. Add --set answer=... --set foil=..."),
    ],
)
def test_measure_refuses_before_it_loads(
    method: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(name: str, device: str) -> None:
        raise AssertionError("loaded")

    monkeypatch.setitem(stratoscope.__dict__, "load", no_load)
    result = measure(method=method)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_interrupt_and_faults() -> None:
    result = measure("--set", "answer=stop")
    assert (result.exit_code, result.stderr) == (130, "Interrupted\n")
    result = measure("--set", "answer=break")
    assert result.exit_code == 1
    assert "Unexpected RuntimeError: a fault." in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupted_sweep_goes_on_from_its_file() -> None:
    first = measure("--save", "half", method="planted_room.sweep")
    assert (first.exit_code, first.stderr) == (130, "Interrupted\n")
    assert "array" not in first.output  # nothing half-labelled
    second = measure("--save", "half", method="planted_room.sweep")
    assert second.exit_code == 0, second.stderr
    assert "array([1])" in second.output


def test_debug_shows_where() -> None:
    arguments = [
        "measure",
        "planted_room.count",
        "--model",
        "m",
        "--prompt",
        "p",
        "--set",
        "answer=refuse",
    ]
    result = run("--debug", *arguments)
    assert type(result.exception).__name__ == "InputError"
    assert type(run(*arguments).exception) is SystemExit


def test_the_installed_command_itself() -> None:
    """Through the real entry point and the real package: exit codes and streams as a shell sees
    them."""
    program = "from stratoscope.cli import main; main()"
    command = [sys.executable, "-c", program, "measure", "no.such", "--model", "m", "--prompt", "p"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: There is no method 'no.such'")
    done = subprocess.run([*command[:3], "--debug", *command[3:]], capture_output=True, text=True)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", "int", 3),
        ("3", "str | None", "3"),
        ("3", "str | int", 3),
        ('"3"', "int | str", "3"),
        (" Paris", "str", " Paris"),
        ("null", "str | None", None),
        ('["a", "b"]', "str | list[str]", ["a", "b"]),
        ("true", "bool", True),
        ("2.5", "<class 'float'>", 2.5),
        ("2", "float | None", 2.0),
        ("2", "<class 'inspect._empty'>", 2),
    ],
)
def test_values_are_read_as_the_option_takes_them(
    text: str, annotation: str, value: object
) -> None:
    from stratoscope.cli.measure import read_value

    assert repr(read_value("option", text, annotation)) == repr(value)


def test_inputs_are_prompts_or_units() -> None:
    assert read_inputs(["a", "b"], []) == ["a", "b"]
    assert read_inputs([], ["29,573", "0,1"]) == [[29, 573], [0, 1]]
    for prompts, units in (([], []), (["a"], ["1,2"])):
        with pytest.raises(InputError, match="--prompt"):
            read_inputs(prompts, units)
    with pytest.raises(InputError, match="LAYER,NEURON"):
        read_inputs([], ["29-573"])


def test_the_package_runs_as_the_command() -> None:
    """Where the command is not on the path, and with the same exit status."""
    run = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "stratoscope", *words], capture_output=True, text=True, cwd="/"
    )
    assert "see, measure and change" in run("--help").stdout.lower()
    assert run("claim", "no-such-paper").returncode == 2
