"""A command in a process of its own, begun with torch and transformers loaded where the system can
fork: 1 s instead of 5 to 20."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Sequence

_LIBRARIES = ["torch", "transformers", "xarray", "scipy.stats"]


def run(arguments: Sequence[str]) -> int:
    """Its exit status. What it prints goes where this process prints."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        start = [sys.executable, "-c", "from stratoscope.cli import main; main()"]
        return subprocess.run([*start, *arguments], check=False).returncode
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    process = context.Process(target=_command, args=(list(arguments),))
    process.start()
    process.join()
    return process.exitcode or 0


def _command(arguments: list[str]) -> None:
    from stratoscope.cli import main

    sys.argv = ["stratoscope", *arguments]
    main()
