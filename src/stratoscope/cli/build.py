"""Build a model with fresh weights, prove that it can be looked into, and save its folder.

METHOD is ROOM.NAME with the verb `build`, as `stratoscope methods` lists it. Example:

stratoscope build architectures.vision.metaformer --set ratio=2 --set seed=1 --out mine
"""

from __future__ import annotations

from pathlib import Path

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import MethodError, ResultError


@click.command(help=__doc__)
@click.argument("method")
@_options.pairs("A setting of its config, or seed")
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

    _files.refuse_no_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ResultError(f"{out} is not empty. Give another folder to --out, or delete it.")
    build = _options.function(method, "build")
    settings = {key: _files.value(text) for key, text in _options.split(pairs).items()}
    model = build(None, **settings)
    known = type(model.config)().to_dict().keys() | {"seed"}
    for key in settings.keys() - known:
        hint = _options.meant(key, known, most=1)
        raise MethodError(f"{type(model.config).__name__} has no setting {key!r}. {hint}".rstrip())
    lm = stratoscope.wrap(model)
    with hub.quiet():
        model.save_pretrained(out)
    size = budget.size(model)
    click.echo(f"{lm}, {size.parameters:,} parameters, {size.embeddings:,} in embeddings")
    click.echo(f"Saved to {out}")
