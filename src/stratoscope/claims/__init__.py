"""What papers say, as claims that run: marked, measured against a null, judged by words written
before, kept for good.

A paper file under `papers/` imports two names, `claim` and `Measured`. Everything else here reads
those files:

    paper.py     a paper file by its text: title, source, claims, methods      ledger.py    the 243
                 papers, built or not
    run.py       measure a claim and judge it                                  verdicts.py  the
                 file that remembers
    figure.py    a claim's small figure: stored, drawn                         pages.py
                 docs/papers, generated
"""

from __future__ import annotations

from stratoscope.claims.claim import Claim, Measured, Verdict, claim

__all__ = ["Claim", "Measured", "Verdict", "claim"]
