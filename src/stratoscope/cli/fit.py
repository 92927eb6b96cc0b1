"""Train a copy of a model, or fit probes to it, and keep the result.

METHOD is ROOM.NAME with the verb `fit`, as `stratoscope methods` lists it. What is trained shows a
bar; killed, it goes on where it stopped when the same command is given again. Examples:

stratoscope fit training.language_model --model smollm2 --data texts.txt --set steps=20 --out tuned

stratoscope fit layers.concept_depth --model smollm2 --data rows.jsonl --out probes

stratoscope fit features.transcoder --model smollm2 --layer 8 --texts corpus.txt --tokens 200000 \
    --out tc8

A sparse dictionary is judged on texts that it was not fitted to: those of --held-out, else one in
twenty of --texts, which the fit does not see then.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

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
    "--texts",
    "data",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .txt with a text on each line, or a .jsonl of rows ({'text': ..., 'label': ...}).",
)
@click.option(
    "--held-out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Rows of the same kind that are not trained on: their loss is kept beside the model.",
)
@click.option("--layer", type=int, help="The same as --set layer=N.")
@click.option("--tokens", type=int, help="The same as --set tokens=N.")
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
    layer: int | None,
    tokens: int | None,
    pairs: tuple[str, ...],
    out: Path,
) -> None:
    use_free_cores()
    import stratoscope
    from stratoscope.cli import _dictionary

    _files.refuse_no_folder(out)
    fit = _options.function(method, "fit")
    options = inspect.signature(fit).parameters
    inputs = _files.rows(data)
    named = {"layer": layer, "tokens": tokens}
    pairs = (*pairs, *(f"{key}={value}" for key, value in named.items() if value is not None))
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
    judged: list[Any] = []
    if method.startswith("features."):
        inputs, judged = _dictionary.apart(inputs, held_out)
    elif held_out is not None:
        if "held_out" not in options:
            raise MethodError(f"{method} has no option held_out. Leave out --held-out.")
        settings["held_out"] = _files.rows(held_out)
    if "folder" in options:
        settings["folder"] = out
    lm = stratoscope.load(model, device=device)
    result = fit(lm, inputs, **settings)
    if not isinstance(result, Path):
        result.save(out)
    click.echo(f"Saved to {out}")
    if judged:
        click.echo(_dictionary.faithful(lm, result, judged))
