"""Serve the same verbs to an agent, by the Model Context Protocol over stdio.

Read-only: a method is run and told in words, with its null; nothing is written, and only results
of the folder given are opened. Example of a client's configuration:

{"command": "stratoscope", "args": ["mcp", "--model", "smollm2"]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _options
from stratoscope.errors import InputError

NEEDS = "the server needs the package mcp: pip install 'stratoscope[mcp]'"


@click.command(help=__doc__)
@_options.models()
@_options.dtype
@_options.device
@_options.folder("Whose saved results may be opened.")
@click.option("--skill", is_flag=True, help="Print SKILL.md, for agents that read one, and end.")
def command(models: tuple[str, ...], dtype: str, device: str, folder: Path, skill: bool) -> None:
    if skill:
        from stratoscope.workbench.skill import text

        click.echo(text())
        return
    use_free_cores()
    from stratoscope.workbench.agent import Agent
    from stratoscope.workbench.desk import Desk

    def load(name: str) -> Any:
        import stratoscope

        return stratoscope.load(name, dtype=dtype, device=device)

    try:
        from stratoscope.workbench.server import server
    except ImportError as error:
        raise InputError(NEEDS) from error
    server(Agent(Desk(models, load), folder.resolve())).run()
