"""Make an edit of a model and keep it; measure and score take it with --edit.

METHOD is ROOM.NAME with the verb `edit`, as `stratoscope methods` lists it. Examples:

stratoscope edit editing.clamp --model smollm2 --request "[[3,12]]" --out clamped.safetensors

stratoscope measure tokens.next_token --model smollm2 --prompt "The sky is" --edit
clamped.safetensors
"""

from __future__ import annotations

from pathlib import Path

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.cli.measure import read_settings


@click.command(help=__doc__)
@click.argument("method")
@_options.model
@_options.device
@click.option(
    "--request",
    "requests",
    required=True,
    multiple=True,
    metavar="VALUE",
    help="What is to be changed, as JSON or text; repeat it for several texts.",
)
@_options.pairs()
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of the edit (safetensors).",
)
def command(
    method: str,
    model: str,
    device: str,
    requests: tuple[str, ...],
    pairs: tuple[str, ...],
    out: Path,
) -> None:
    use_free_cores()
    import stratoscope

    _files.refuse_no_folder(out)
    edit = _options.function(method, "edit")
    settings = read_settings(method, edit, pairs)
    values = [_files.value(text) for text in requests]
    request = values if len(values) > 1 or isinstance(values[0], str) else values[0]
    made = edit(stratoscope.load(model, device=device), request, **settings)
    made.save(out)
    click.echo(
        f"Saved to {out}: {len(made.interventions)} interventions, {len(made.deltas)} changed "
        f"parameters{'. ' + made.note if made.note else ''}"
    )
