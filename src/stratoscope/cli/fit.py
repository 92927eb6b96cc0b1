"""Train a copy of a model, or fit probes to it, and keep the result.

METHOD is ROOM.NAME with the verb `fit`, as `stratoscope methods` lists it. What is trained shows a
bar; killed, it goes on where it stopped when the same command is given again. Examples:

stratoscope fit training.language_model --model smollm2 --data texts.txt --set steps=20 --out tuned

stratoscope fit layers.concept_depth --model smollm2 --data rows.jsonl --out probes
"""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.cli.measure import read_settings
from stratoscope.errors import InputError, MethodError


@click.command(help=__doc__)
@click.argument("method")
@_options.model
@_options.device
@click.option(
    "--data",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .txt with a text on each line, or a .jsonl of rows ({'text': ..., 'label': ...}).",
)
@click.option(
    "--held-out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Rows of the same kind that are not trained on: their loss is kept beside the model.",
)
@_options.pairs()
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of the result.",
)
def command(
    method: str,
    model: str,
    device: str,
    data: Path,
    held_out: Path | None,
    pairs: tuple[str, ...],
    out: Path,
) -> None:
    use_free_cores()
    import stratoscope

    _files.refuse_no_folder(out)
    fit = _options.function(method, "fit")
    options = inspect.signature(fit).parameters
    inputs = _files.rows(data)
    if "labels" in options and "labels" not in _options.split(pairs):
        wrong = [
            n for n, row in enumerate(inputs, 1) if not isinstance(row, dict) or "label" not in row
        ]
        if wrong:
            raise InputError(
                f"{data}, row {wrong[0]}: {method} needs a label for each text: rows of "
                '{"text": ..., "label": ...}, or --set labels=[...].'
            )
        pairs = (*pairs, f"labels={[row['label'] for row in inputs]}")
        inputs = [row["text"] for row in inputs]
    settings = read_settings(method, fit, pairs)
    if held_out is not None:
        if "held_out" not in options:
            raise MethodError(f"{method} has no option held_out. Leave out --held-out.")
        settings["held_out"] = _files.rows(held_out)
    if "folder" in options:
        settings["folder"] = out
    result = fit(stratoscope.load(model, device=device), inputs, **settings)
    if not isinstance(result, Path):
        result.save(out)
    click.echo(f"Saved to {out}")
