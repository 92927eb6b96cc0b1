"""Run one measuring method on a model and show the result.

METHOD is ROOM.NAME as `stratoscope methods` lists it. Example:

stratoscope measure layers.logit_lens --model HuggingFaceTB/SmolLM2-135M --prompt "The capital of
France is"
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import InputError, MethodError

if TYPE_CHECKING:
    import xarray as xr


@click.command(help=__doc__)
@click.argument("method")
@_options.model
@_options.device
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeat for several.")
@click.option(
    "--unit",
    "units",
    multiple=True,
    metavar="LAYER,NEURON",
    help="Instead of prompts, for methods on neurons.",
)
@_options.pairs()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also save the result here: .nc (netCDF), .csv, .json, or a picture, .svg or .html.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="For sweeps: keep what is finished here; after an interruption, go on from there.",
)
@_options.edits("Measure")
def command(
    method: str,
    model: str,
    device: str,
    prompts: tuple[str, ...],
    units: tuple[str, ...],
    pairs: tuple[str, ...],
    out: Path | None,
    save: Path | None,
    edits: tuple[Path, ...],
) -> None:
    use_free_cores()
    import stratoscope

    # All that can be refused is refused before the model, which is slow, is loaded.
    _files.refuse_no_folder(out)
    measure = _options.function(method, "measure")
    settings = read_settings(method, measure, pairs)
    options = inspect.signature(measure).parameters
    if save is not None:
        if "save" not in options:
            raise MethodError(
                f"{method} is no sweep that could be resumed: it has no option save. Leave out "
                "--save."
            )
        settings["save"] = save
    inputs = read_inputs(prompts, units)
    with progress_bar(method) as advance:
        if "progress" in options:
            settings.setdefault("progress", advance)
        lm = stratoscope.load(model, device=device)
        with _files.changed(lm, edits):
            result = measure(lm, inputs, **settings)
    show(result)
    _files.save(result, out)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Yield progress(done, total); a bar on stderr, only where it is a terminal, and only once
    there is progress."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(name, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def read_inputs(prompts: Sequence[str], units: Sequence[str]) -> list[str] | list[list[int]]:
    """The prompts, or the units as [layer, neuron]; InputError when there are none, both, or an
    unreadable one."""
    if bool(prompts) == bool(units):
        raise InputError(
            "give either --prompt (once or more) or, for methods on neurons, --unit LAYER,NEURON."
        )
    if unreadable := [unit for unit in units if not re.fullmatch(r"\d+,\d+", unit)]:
        raise InputError(f"--unit {unreadable[0]!r}: write LAYER,NEURON, as in 29,573.")
    return [[int(part) for part in unit.split(",")] for unit in units] or list(prompts)


def read_settings(method: str, measure: Callable[..., Any], pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` texts into keyword arguments; MethodError on one that `measure` has not, or
    lacks."""
    parameters = inspect.signature(measure).parameters.values()
    options = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    valid = ", ".join(options) or "none"
    settings: dict[str, Any] = {}
    for key, text in _options.split(pairs, f" Options of {method}: {valid}.").items():
        if key not in options:
            hint = f"{_options.meant(key, options, most=1)} Its options: {valid}.".lstrip()
            raise MethodError(f"{method} has no option {key!r}. {hint}")
        settings[key] = read_value(
            key, text, inspect.formatannotation(options[key].annotation).strip("'")
        )
    missing = [name for name, p in options.items() if p.default is p.empty and name not in settings]
    if missing:
        raise MethodError(
            f"{method} needs {', '.join(missing)}. Add "
            f"{' '.join(f'--set {m}=...' for m in missing)}."
        )
    return settings


def read_value(key: str, text: str, annotation: str) -> Any:
    """Read `text` as JSON, or else as itself; " 42" stays text for an option that takes no
    numbers."""
    value = _files.value(text)
    kinds = set(re.findall(r"\w+", annotation)) - {"None"}
    if kinds and kinds <= {"int", "float", "bool"} and not isinstance(value, int | float | None):
        raise MethodError(f"Option {key} takes {annotation}, and got {text!r}.")
    if isinstance(value, int | float) and "str" in kinds and not kinds & {"int", "float", "bool"}:
        return text
    return float(value) if type(value) is int and "float" in kinds and "int" not in kinds else value


def show(result: xr.DataArray | xr.Dataset) -> None:
    """Print the result: a picture where there is one, its numbers as xarray shows them, then where
    they come from."""
    import xarray as xr

    from stratoscope.errors import ResultError
    from stratoscope.report.show import show as picture

    with suppress(ResultError):  # words alone have none
        click.echo(repr(picture(result)))
    with xr.set_options(display_width=80, display_expand_attrs=False, display_max_rows=20):
        click.echo(str(result))
    provenance = json.loads(result.attrs.get("provenance", "{}"))
    for key, value in {"method": result.attrs.get("method", ""), **provenance}.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key}: {text}")
