"""Build a model with fresh weights, prove that it can be looked into, and save its folder.

METHOD is ROOM.NAME with the verb `build`, as `stratoscope methods` lists it. Example:

stratoscope build architectures.vision.metaformer --set ratio=2 --set seed=1 --out mine
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import click

from stratoscope import catalogue
from stratoscope._threads import use_free_cores
from stratoscope.cli import _files
from stratoscope.errors import MethodError, ResultError


@click.command(help=__doc__)
@click.argument("method")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of its config, or seed, as JSON or text.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The model's folder.",
)
def command(method: str, pairs: tuple[str, ...], out: Path) -> None:
    use_free_cores()
    import stratoscope
    from stratoscope.engine import budget
    from stratoscope.store import hub

    entry = catalogue.find(method)
    if "build" not in entry.verbs:
        raise MethodError(f"{method} builds nothing: it can only {' and '.join(entry.verbs)}.")
    _files.refuse_no_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ResultError(f"{out} is not empty. Give another folder to --out, or delete it.")
    split = [pair.partition("=") for pair in pairs]
    if bare := [key for key, equals, _ in split if not equals]:
        raise MethodError(f"--set takes KEY=VALUE, and got {bare[0]!r}.")
    settings = {key: _files.value(text) for key, _, text in split}
    model = catalogue.module(method).build(None, **settings)
    known = type(model.config)().to_dict().keys() | {"seed"}
    for key in settings.keys() - known:
        near = get_close_matches(key, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise MethodError(f"{type(model.config).__name__} has no setting {key!r}.{hint}")
    lm = stratoscope.wrap(model)
    with hub.quiet():
        model.save_pretrained(out)
    size = budget.size(model)
    click.echo(f"{lm}, {size.parameters:,} parameters, {size.embeddings:,} in embeddings")
    click.echo(f"Saved to {out}")
