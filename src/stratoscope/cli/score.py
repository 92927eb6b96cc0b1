"""Answer the questions of a benchmark file, beside what needs no understanding.

FILE holds JSON lines as ARC, HellaSwag or BLiMP have them, or rows of context, choices and gold.
With --out, an interrupted scoring goes on where it stopped when the same command is given again.
Example:

stratoscope score questions.jsonl --model smollm2 --out scores.nc
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.cli.measure import progress_bar

if TYPE_CHECKING:
    import numpy as np


@click.command(help=__doc__)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_options.model
@_options.device
@click.option(
    "--format",
    "kind",
    help="Of the file: plain, arc, hellaswag, blimp [default: seen from its rows].",
)
@click.option(
    "--normalise",
    default="sum",
    show_default=True,
    help="A choice's score: sum, tokens, characters, or blind.",
)
@click.option("--limit", type=click.IntRange(1), help="Only so many questions, from the start.")
@_options.edits("Score")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also save every question's scores here (netCDF); what is finished is kept beside it.",
)
def command(
    file: Path,
    model: str,
    device: str,
    kind: str | None,
    normalise: str,
    limit: int | None,
    edits: tuple[Path, ...],
    out: Path | None,
) -> None:
    use_free_cores()
    import stratoscope
    from stratoscope.benchmarks import controls, formats, likelihood

    _files.refuse_no_folder(out)
    save = None if out is None else out.with_name(f".{out.name}.scoring")
    items = formats.read(file, format=kind)[:limit]
    lm = stratoscope.load(model, device=device)
    with _files.changed(lm, edits):
        with progress_bar("choices") as advance:
            scored = likelihood.score(lm, items, save=save, normalise=normalise, progress=advance)
        with progress_bar("without contexts") as advance:
            beside = controls.score(lm, items, save=save, normalise=normalise, progress=advance)
    right = scored["right"].to_numpy()
    groups = sorted({item.group for item in items})
    rows = [("model", _share(right))]
    if len(groups) > 1:
        own = scored["group"].to_numpy()
        rows += [(f"  {name or '(no group)'}", _share(right[own == name])) for name in groups]
    beside_them = zip(beside["control"].to_numpy(), beside["accuracy"].to_numpy())
    rows += [(str(name), f"{value:6.1%}") for name, value in beside_them]
    width = max(len(name) for name, _ in rows)
    for name, words in rows:
        click.echo(f"{name:<{width}}  {words}")
    _files.save(scored, out)
    if save is not None:
        for finished in filter(None, (save, likelihood.blind_file(save))):
            finished.unlink(missing_ok=True)


def _share(right: np.ndarray) -> str:
    """The accuracy, and its interval where there is one."""
    from stratoscope.maths.resample import interval

    spread = interval(right)
    span = "" if spread.note else f"  [{max(spread.low, 0):.1%}, {min(spread.high, 1):.1%}]"
    return f"{spread.value:6.1%}{span}  of {spread.n}"
