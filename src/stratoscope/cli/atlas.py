"""Write the whole atlas as one HTML page that works offline, and atlas.json beside it.

Example:

stratoscope atlas --out atlas.html
"""

from __future__ import annotations

from pathlib import Path

import click

from stratoscope.cli import _claims


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="atlas.html",
    show_default=True,
    help="The page; the data go beside it, as the same name with .json.",
)
def command(out: Path) -> None:
    from stratoscope.claims import atlas, ledger
    from stratoscope.report import atlas as page

    whole = ledger.atlas()
    data = atlas.data(whole)
    written = page.write(data, out)
    written_data = atlas.write(data, out.with_suffix(".json"))
    claims = sum(len(paper["claims"]) for paper in data["papers"])
    counts = ", ".join(f"{count} {status}" for status, count in data["counts"].items())
    beside = f" and {len(whole.across)} files across papers" if whole.across else ""
    click.echo(f"{len(whole.entries)} papers{beside}, {claims} claims. The papers: {counts}.")
    click.echo(f"Page: {written.absolute().as_uri()}\nData: {written_data}")
    _claims.warn(_claims.console(), whole.problems)
