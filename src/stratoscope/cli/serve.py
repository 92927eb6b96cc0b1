"""Open the workbench: a local page on which a prompt is typed, seen, clicked at and changed.

Only this machine can ask it, with the token of the address that is printed. Ctrl-C ends it.

Example:

stratoscope serve --model smollm2 --texts corpus.txt
"""

from __future__ import annotations

import secrets
import socket
import webbrowser
from pathlib import Path
from typing import Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _files, _options
from stratoscope.errors import InputError

NEEDS = "the workbench needs starlette and uvicorn: pip install 'stratoscope[workbench]'"


@click.command(help=__doc__)
@_options.models(", to compare")
@_options.dtype
@_options.device
@_options.folder("Where saved results and pages may be opened from.")
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .txt with a text on each line, or a .jsonl of texts: for a neuron's top texts.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--browser/--no-browser", default=True, help="Open the page in the browser.")
def command(
    models: tuple[str, ...],
    dtype: str,
    device: str,
    folder: Path,
    texts: Path | None,
    port: int,
    browser: bool,
) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise InputError(NEEDS) from error
    corpus = _files.rows(texts) if texts else []
    if not all(isinstance(text, str) for text in corpus):
        raise InputError(f"{texts}: each row must be a text.")
    use_free_cores()
    import stratoscope
    from stratoscope.workbench.app import create
    from stratoscope.workbench.desk import Desk

    def load(name: str) -> Any:
        return stratoscope.load(name, dtype=dtype, device=device)

    desk = Desk(models, load, corpus)
    listening = listen(port)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24)
    app = create(desk, folder.resolve(), token=token, port=port)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    address = f"http://127.0.0.1:{port}/?token={token}"
    click.echo(f"Opening {models[0]} ...")
    desk.lanes(models[0])  # what cannot be opened is said before the page is
    click.echo(f"The workbench is at\n\n  {address}\n\nCtrl-C ends it.")
    if browser:
        webbrowser.open(address)
    uvicorn.Server(config).run(sockets=[listening])


def listen(port: int) -> socket.socket:
    """Of this machine alone. Raises InputError for a port that is taken or not ours to take."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"port {port} cannot be had ({error.strerror}): leave --port out for a free one."
        ) from error
    return listening
