"""Explain one next-token prediction, from tokens to neurons, in one HTML report.

Example:

stratoscope explain "When Mary and John went to the store, John gave a drink to" --answer " Mary"
--foil " John"
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import InputError, ResultError
from stratoscope.report import steps
from stratoscope.report.steps import FAST, NEEDS, STEPS

if TYPE_CHECKING:
    from stratoscope.report.page import Explanation

_BETWEEN = 10.0  # seconds between two drawings of an unfinished page
NAMES = {"load": "loading the model"} | steps.NAMES


@click.command(help=__doc__)
@click.argument("prompt")
@click.option("--answer", help="Explain this next token (default: the most probable one).")
@click.option("--foil", help="... rather than this one (default: a likely one of its kind).")
@click.option(
    "--corrupt",
    help="A prompt of as many tokens with another answer (default: made automatically).",
)
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    help="A name, a Hugging Face id or a local folder.",
)
@_options.dtype
@_options.device
@click.option(
    "--whole",
    is_flag=True,
    help="Score --answer and --foil with all their tokens, not by their first ones.",
)
@_options.edits("Explain")
@click.option("--circuit", is_flag=True, help="Also find a circuit of edges; takes minutes.")
@click.option(
    "--skip",
    multiple=True,
    metavar="STEP",
    help="Leave out a step, such as heads.roles; repeatable.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="STEP",
    help="Leave out every other step but the prediction; repeatable.",
)
@click.option(
    "--fast", is_flag=True, help="Leave out what takes longest: patching, Shapley, roles."
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Of nulls, random sequences and the corrupt prompt.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    help="The report's file.",
)
def command(
    out: Path,
    model: str,
    dtype: str,
    device: str,
    edits: tuple[Path, ...],
    only: tuple[str, ...],
    fast: bool,
    **question: Any,
) -> None:
    _refuse(question, out)
    question["skip"] = _left_out(question["skip"], only, fast)
    began = time.perf_counter()
    latest: list[Explanation] = []
    written = began

    def keep(explanation: Explanation) -> None:
        """The file is a whole page from the first step on, and never far behind: a page takes a
        second to draw."""
        nonlocal written
        first, latest[:] = not latest, [explanation]
        if first or time.perf_counter() - written > _BETWEEN:
            write_page()
            written = time.perf_counter()

    def write_page() -> None:
        from stratoscope.report.page import write

        latest[0].provenance.update(
            seconds=round(time.perf_counter() - began, 1),
            peak_memory_mb=_peak_megabytes(),
            command=shlex.join(["stratoscope", *sys.argv[1:]]),
        )
        write(latest[0], out)

    try:
        with _progress(question["circuit"], question["skip"]) as report:
            report("load", 0, 0)
            use_free_cores()
            import stratoscope

            lm = stratoscope.load(model, dtype=dtype, device=device)
            from stratoscope.report.explain import explain

            with _files.changed(lm, edits):
                latest[:] = [explain(lm, report=report, keep=keep, **question)]
            write_page()
    except BaseException:
        if latest:
            with suppress(ResultError):  # a full disk has been told already
                write_page()
            done = len(latest[0].results)
            click.echo(
                f"What was finished ({done} results) is in {out.absolute().as_uri()}", err=True
            )
        raise
    _summary(latest[0])
    click.echo(f"\nReport: {out.absolute().as_uri()}")


def _refuse(question: dict[str, Any], out: Path) -> None:
    """What is wrong with a question is said before any work."""
    if not question["prompt"].strip():
        raise InputError("the prompt is empty: there is no token to explain.")
    for name in ("answer", "foil", "corrupt"):
        if question[name] == "":
            raise InputError(f"--{name} is empty: leave it out, or give at least one token.")
    if question["whole"] and not (question["answer"] and question["foil"]):
        raise InputError("--whole compares two whole texts: give --answer and --foil.")
    if question["corrupt"] == question["prompt"]:
        raise InputError(
            "--corrupt is the prompt itself: there is nothing to restore. Exchange a word of it."
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ResultError(
            f"{out} cannot be written: its folder does not exist, or it is a folder itself."
        )


def _left_out(skip: tuple[str, ...], only: tuple[str, ...], fast: bool) -> tuple[str, ...]:
    """The steps that will not run. Raises InputError for a step that there is not."""
    if unknown := sorted({*skip, *only} - {*STEPS[1:]}):
        raise InputError(
            f"{', '.join(unknown)}: there is no such step. Those that can be named are "
            f"{', '.join(STEPS[1:])}."
        )
    wanted = {*only} | {NEEDS[step] for step in only if step in NEEDS}
    others = [step for step in STEPS[1:] if only and step not in wanted]
    return tuple(dict.fromkeys([*skip, *others, *(FAST if fast else ())]))


class _progress:
    """A line that says which step runs, and how long is left; a quiet line for each step without a
    terminal."""

    def __init__(self, circuit: bool, skip: Collection[str] = ()) -> None:
        skip = {*skip} | (set() if circuit else {"circuits.discover"})
        self.order = [name for name in NAMES if name not in skip]
        self.began = 0.0
        self.announced = False

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.live = (
            Progress(*columns, console=console, transient=True) if console.is_terminal else None
        )
        self.task: Any = None
        if self.live:
            self.live.start()
        return self.step

    def step(self, name: str, done: int, total: int) -> None:
        if not total:
            self.began, self.announced = time.perf_counter(), False
        number = self.order.index(name) + 1 if name in self.order else len(self.order)
        text = f"{number}/{len(self.order)} {NAMES.get(name, name)}"
        if self.live is None:
            if not total:
                click.echo(f"  {text} ...", err=True)
            elif (left := self._left(done, total)) and not self.announced:
                self.announced = True
                click.echo(f"      about {left:.0f} s to go", err=True)
            return
        if not total:
            if self.task is not None:
                self.live.remove_task(self.task)
            self.task = self.live.add_task(text, total=None)
        else:
            self.live.update(self.task, completed=done, total=total)

    def _left(self, done: int, total: int) -> float:
        """Seconds that this step will still take, where that is long enough to be told; else 0."""
        spent = time.perf_counter() - self.began
        left = spent * (total - done) / max(done, 1)
        return left if spent > 1 and left > 5 else 0.0

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()


def _summary(explanation: Explanation) -> None:
    """A screenful: the prediction, who writes it, where it passes, which tokens matter."""
    from rich.console import Console
    from rich.table import Table

    from stratoscope.report import words
    from stratoscope.report.explanation import LEFT_OUT

    console = Console()
    console.print()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(explanation):
        table.add_row(name, _plain(text))
    console.print(table)
    if (verbal := explanation.one("tokens.verbalize")) is not None:
        console.print()
        console.print(_plain(str(verbal["text"].values)))
    for note in explanation.notes:
        console.print(_plain(f"Note: {note}"), style="yellow")
    chosen = [name for name, why in explanation.missing.items() if why == LEFT_OUT]
    for name, why in explanation.missing.items():
        if name not in chosen:
            console.print(_plain(f"Without {NAMES.get(name, name)}: {why}"), style="yellow")
    if chosen:
        console.print(_plain(f"Left out as you asked: {', '.join(chosen)}."), style="dim")
    ran_on = words.ran_on(explanation.provenance)
    console.print(
        f"{explanation.provenance['seconds']:.0f} s, "
        f"{explanation.provenance['peak_memory_mb']:.0f} MB; {ran_on}",
        style="dim",
    )


def _rows(explanation: Explanation) -> list[tuple[str, str]]:
    """What the terminal says, line by line; a step that is missing has no line."""
    from stratoscope.plots.text import based, isolated, percent
    from stratoscope.report import words

    def shown(text: str) -> str:
        return isolated(repr(based(text)))

    rows = [
        (
            "next token" if explanation.masked is None else "at the mask",
            ", ".join(f"{shown(token)} {percent(p)}" for token, p in explanation.predictions[:4]),
        )
    ]
    question = f"why {shown(explanation.answer)} rather than {shown(explanation.foil)}"
    question += ", both scored whole" * explanation.whole
    direct = explanation.one("layers.direct_logit_attribution")
    if direct is not None:
        question += f": logit difference {float(direct.logit_difference):+.2f}"
    rows.append(("question", question))
    if direct is not None:
        error = f"all sum to the difference, error {float(direct.residual_error):.0e}"
        rows.append(
            (
                "written by",
                f"{words.writers(direct, explanation.answer, explanation.foil)} ({error})",
            )
        )
    if (heads := explanation.one("heads.activation_patching")) is not None:
        clear = words.causes(heads, 5)
        names = ", ".join(f"{words.head_name(place)} {place['value']:+.0%}" for place in clear)
        reach = f"(beyond chance: {words.drawn(heads)})"
        rows.append(
            (
                "caused by",
                f"{names}  {reach}" if names else words.strongest_heads(heads),
            )
        )
    if explanation.corrupt_prompt is not None:
        rows.append(("corrupt prompt", shown(explanation.corrupt_prompt)))
    return rows


def _plain(text: str) -> Any:
    """Text in which brackets are brackets, not rich's markup, and right-to-left words move nothing
    around them."""
    from rich.text import Text

    from stratoscope.plots.text import isolated, runs

    if "\u2068" in text:  # isolated already, as whole tokens
        return Text(text)
    return Text("".join(isolated(piece) for piece, _ in runs(text)))


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 0)
