"""Check every shape and type annotation of stratoscope while its tests run, on one thread for each
process."""

from __future__ import annotations

import os

import jaxtyping

# torch reads this when it is first imported, which may be never: this file does not import it.
# One thread: the tests run in as many processes as there are cores (make test), and tensors are
# tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

jaxtyping.install_import_hook("stratoscope", "beartype.beartype")
