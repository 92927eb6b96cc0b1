"""One file for each paper that is built: its source, its methods, its claims; `verdicts/` beside
them remembers.

`ledger.tsv` lists all 243 papers, built or not.
"""

from __future__ import annotations

from stratoscope._lazy import lazy

__getattr__, __dir__ = lazy(__name__, __path__)
