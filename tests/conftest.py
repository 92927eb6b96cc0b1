"""Check every shape and type annotation of stratoscope while its tests run, on two threads."""

from __future__ import annotations

import os

import jaxtyping

# torch reads this when it is first imported, which may be never: this file does not import it.
os.environ.setdefault("OMP_NUM_THREADS", "2")

jaxtyping.install_import_hook("stratoscope", "beartype.beartype")
