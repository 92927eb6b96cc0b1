"""Merge models that were trained from one base into one, as an ordinary Hugging Face folder.

--models, --weights, --texts and --items take several values. With --texts (a file for each model,
or one for all) the perplexity of the base, of each model and of the merged one on its texts is
printed; with --items their accuracy on its questions (ARC, HellaSwag, BLiMP or plain rows, as
`stratoscope score` reads them). Example:

stratoscope merge --base smollm2 --models first second --method ties --density 0.2 --texts
first.txt second.txt --out both
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import InputError

_SEVERAL = ("--models", "--weights", "--texts", "--items")


class _Several(click.Command):
    """Options that take all words up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given: list[str] = []
        taking = ""
        for word in args:
            # a negative number is a value
            if word.startswith("-") and not word[1:2].isdigit():
                taking = word if word in _SEVERAL else ""
                given += [] if taking else [word]
            else:
                given += [taking, word] if taking else [word]
        return super().parse_args(ctx, given)


def _several(name: str, what: str, **options: Any) -> Callable[..., Any]:
    return click.option(f"--{name}", name, multiple=True, help=what, **options)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(help=__doc__, cls=_Several)
@click.option("--base", required=True, help="The model that all were trained from.")
@_several("models", "Names, folders, or folders of adapters.", required=True)
@click.option("--method", default="ties", show_default=True, help="See `methods editing.merge`.")
@_several("weights", "One for each model [default: 1].", type=float)
@click.option("--density", type=float, help="The share that is kept [default: 0.2].")
@click.option("--scale", default=1.0, show_default=True, help="Of the merged task vector.")
@click.option("--seed", default=0, show_default=True, help="Of what DARE drops.")
@_several("texts", "Texts of each model's task (.txt, .jsonl), or of all.", type=_FILE)
@_several("items", "Questions of each model's task, or of all.", type=_FILE)
@_options.device
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder of the merged model.",
)
def command(
    base: str,
    models: tuple[str, ...],
    method: str,
    weights: tuple[float, ...],
    density: float | None,
    scale: float,
    seed: int,
    texts: tuple[Path, ...],
    items: tuple[Path, ...],
    device: str,
    out: Path,
) -> None:
    use_free_cores()
    from stratoscope import catalogue

    merge = catalogue.module("editing.merge")
    merge.refuse_taken(out)
    judges = _judges(models, texts, items)
    before = _before(base, models, judges, device) if judges else []
    click.echo(f"Merging {len(models)} models by {method}: {merge.size(base) / 1e6:,.0f} MB")
    merge.write(
        base,
        models,
        out,
        method=method,
        weights=list(weights) or None,
        density=density,
        scale=scale,
        seed=seed,
    )
    click.echo(f"Saved to {out}")
    if judges:
        import stratoscope

        merged = stratoscope.load(out, device=device)
        _show(judges, models, before, [judge(merged) for _, judge in judges])


Judge = Callable[[Any], float]


def _judges(
    models: tuple[str, ...], texts: tuple[Path, ...], items: tuple[Path, ...]
) -> list[tuple[str, Judge]]:
    """What each model is judged by, one after the other: perplexities, then accuracies."""
    judges: list[tuple[str, Judge]] = []
    for option, files, made in (
        ("texts", texts, _perplexity),
        ("items", items, _accuracy),
    ):
        if files and len(files) not in (1, len(models)):
            raise InputError(
                f"{len(models)} models and {len(files)} files of --{option}: give one for each "
                "model, or one for all."
            )
        every = files * len(models) if len(files) == 1 else files
        judges += [(option, made(path)) for path in every]
    return judges


def _perplexity(path: Path) -> Judge:
    from stratoscope import catalogue

    rows = [row["text"] if isinstance(row, dict) else row for row in _files.rows(path)]
    method = catalogue.module("tokens.perplexity")
    return lambda lm: method.perplexity(method.measure(lm, rows))


def _accuracy(path: Path) -> Judge:
    from stratoscope.benchmarks import formats, likelihood

    questions = formats.read(path)
    return lambda lm: float(likelihood.score(lm, questions)["right"].mean())


def _before(
    base: str, models: tuple[str, ...], judges: list[tuple[str, Judge]], device: str
) -> list[tuple[float, float]]:
    """Of each judge, what the base has and what its own model has."""
    import stratoscope
    from stratoscope import catalogue

    lm = stratoscope.load(base, device=device)
    vectors = catalogue.module("editing.task_vector")
    of_base = [judge(lm) for _, judge in judges]
    own: dict[int, float] = {}
    for place, model in enumerate(models):
        with vectors.edit(lm, model):
            for number in range(place, len(judges), len(models)):
                own[number] = judges[number][1](lm)
    return [(value, own[number]) for number, value in enumerate(of_base)]


def _show(
    judges: list[tuple[str, Judge]],
    models: tuple[str, ...],
    before: list[tuple[float, float]],
    after: list[float],
) -> None:
    """A line for each model and kind of score."""
    width = max(len(name) for name in models)
    for number, ((kind, _), (base, own), merged) in enumerate(zip(judges, before, after)):
        if number % len(models) == 0:
            what = "perplexity on its texts" if kind == "texts" else "share of its items right"
            click.echo(f"{what}: the base, the model, merged")
        form = "8.3f" if kind == "texts" else "8.1%"
        name = models[number % len(models)]
        click.echo(f"  {name:<{width}} {base:{form}} {own:{form}} {merged:{form}}")
