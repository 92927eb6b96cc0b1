"""What papers say, as claims that run: marked, measured against a null, judged by words written
before, kept for good.

A paper file under `papers/` imports two names, `claim` and `Measured`. Everything else here reads
those files:

    claim.py       what is said and expected        measured.py   what one run found
    expression.py  the comparisons                  trial.py      refuses what cannot fail
    verdict.py     the word of one run              words.py      the two words of a paper
    paper.py       a paper file by its text         ledger.py     the 243 papers, built or not
    run.py         measure a claim and judge it     due.py        what is still to be measured
    verdicts.py    the files that remember          code.py       what a verdict was measured with
    register.py    what was expected beforehand     figure.py     a claim's figure: stored, drawn
    page.py        one paper's page                 statement.py  one statement on it
    forest.py      the picture of a statement       pages.py      docs/papers, generated
    skeleton.py    a new paper's files              atlas.py      all of it as data
"""

from __future__ import annotations

from stratoscope.claims.claim import Claim, claim
from stratoscope.claims.measured import Measured
from stratoscope.claims.verdict import Verdict

__all__ = ["Claim", "Measured", "Verdict", "claim"]
