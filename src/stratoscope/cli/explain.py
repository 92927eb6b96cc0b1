"""Explain one next-token prediction, from tokens to neurons, in one HTML report.

Example:

stratoscope explain "When Mary and John went to the store, John gave a drink to" --answer " Mary" --foil " John"
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.errors import InputError, ResultError

if TYPE_CHECKING:
    from stratoscope.report.page import Explanation

NAMES = {
    "load": "loading the model",
    "tokens.next_token": "what it predicts",
    "layers.logit_lens": "the prediction through the layers",
    "layers.direct_logit_attribution": "which components write it",
    "tokens.occlusion": "which tokens matter: occlusion",
    "tokens.integrated_gradients": "which tokens matter: integrated gradients",
    "tokens.gradient_times_input": "which tokens matter: gradient x input",
    "tokens.verbalize": "the evidence in words",
    "tokens.corruption": "a corrupt prompt",
    "layers.activation_patching": "patching layers and tokens, and the null",
    "heads.activation_patching": "patching heads, and the null",
    "heads.attention_pattern": "attention patterns",
    "heads.roles": "roles of heads",
    "neurons.contribution": "which neurons write it",
    "neurons.vocabulary": "what those neurons say",
    "clamp": "switching them off",
    "circuits.discover": "a circuit of edges (minutes)",
}


@click.command(help=__doc__)
@click.argument("prompt")
@click.option("--answer", help="Explain this next token (default: the most probable one).")
@click.option("--foil", help="... rather than this one (default: a likely one of its kind).")
@click.option("--corrupt", help="A prompt of as many tokens with another answer (default: made automatically).")
@click.option("--model", default="smollm2", show_default=True, help="A name, a Hugging Face id or a local folder.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, ...")
@click.option("--circuit", is_flag=True, help="Also find a circuit of edges; takes minutes.")
@click.option("--seed", default=0, show_default=True, help="Of nulls, random sequences and the corrupt prompt.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    help="The report's file.",
)
def command(out: Path, model: str, dtype: str, device: str, **question: Any) -> None:
    if not question["prompt"].strip():
        raise InputError("the prompt is empty: there is no token to explain.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ResultError(f"{out} cannot be written: its folder does not exist, or it is a folder itself.")
    began = time.perf_counter()
    with _progress() as report:
        report("load", 0, 0)
        use_free_cores()
        import stratoscope

        lm = stratoscope.load(model, dtype=dtype, device=device)
        from stratoscope.report.explain import explain

        found = explain(lm, report=report, **question)
    found.provenance.update(
        seconds=round(time.perf_counter() - began, 1),
        peak_memory_mb=_peak_megabytes(),
        command=shlex.join(["stratoscope", *sys.argv[1:]]),
    )
    from stratoscope.report.page import write

    write(found, out)
    _summary(found)
    click.echo(f"\nReport: {out.absolute().as_uri()}")


class _progress:
    """A line that says what runs now; quiet lines, one for each step, when the output is not a terminal."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
        self.live = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.task: Any = None
        if self.live:
            self.live.start()
        return self.step

    def step(self, name: str, done: int, total: int) -> None:
        text = NAMES.get(name, name)
        if self.live is None:
            if not total:
                click.echo(f"  {text} ...", err=True)
            return
        if not total:
            if self.task is not None:
                self.live.remove_task(self.task)
            self.task = self.live.add_task(text, total=None)
        else:
            self.live.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()


def _summary(found: Explanation) -> None:
    """A screenful: the prediction, who writes it, where it passes, which tokens matter."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    quote = lambda text: repr(str(text))  # noqa: E731
    console.print()
    chances = ", ".join(f"{quote(token)} {p:.1%}" for token, p in found.predictions[:4])
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    add = lambda name, text: table.add_row(name, _plain(text))  # noqa: E731
    add("next token", chances)
    direct = found.one("layers.direct_logit_attribution")
    add(
        "question",
        f"why {quote(found.answer)} rather than {quote(found.foil)}: logit difference {float(direct.logit_difference):+.2f}",
    )
    order = abs(direct.contribution).argsort()[::-1][:6]
    parts = (f"{direct.component[i].values!s} {float(direct.contribution[i]):+.2f}" for i in order.values)
    add(
        "written by",
        ", ".join(parts) + f"  (all sum to the difference, error {float(direct.residual_error):.0e})",
    )
    heads = found.one("heads.activation_patching")
    flat = heads.effect.stack(place=("layer", "head"))
    top = abs(flat).argsort()[::-1][:5].values
    names = (f"L{int(flat['layer'][i])}H{int(flat['head'][i])} {float(flat[i]):+.0%}" for i in top)
    add("caused by", ", ".join(names) + f"  (largest of the null {float(abs(heads.null).max()):.0%})")
    add("corrupt prompt", f"{quote(found.corrupt_prompt)}")
    console.print(table)
    console.print()
    console.print(_plain(str(found.one("tokens.verbalize")["text"].values)))
    for note in found.notes:
        console.print(_plain(f"Note: {note}"), style="yellow")
    console.print(f"{found.provenance['seconds']:.0f} s, {found.provenance['peak_memory_mb']:.0f} MB", style="dim")


def _plain(text: str) -> Any:
    """Text in which brackets are brackets, not rich's markup."""
    from rich.text import Text

    return Text(text)


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 0)
