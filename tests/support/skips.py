"""Why a test may be skipped: a closed list. Any other skip fails the run (see `conftest.py`).

A method may refuse a subject; what may stand in the way is listed here as well, so that a method
which begins to refuse what it ran on, for a reason of its own making, is seen.
"""

from __future__ import annotations

import re

# Without these a test cannot run on this machine. `make fetch` and a browser are there in CI.
MACHINE = (
    r"not in the cache",
    r"^needs a (browser|Chromium)",
    r"^root may write anywhere",
    r"^this torch was built without oneDNN",
)
# Of the cross of all methods with all subjects.
CROSS = (
    r"^refused: ",  # the contract suite's own, whose reason is in REFUSALS
    r"^refused in float32 as well: ",
    r"^a stream that is a sum has no norms to name",
    r"^this model reports no attention of its own",
    r"^one kernel is enough for the second model",
)
# Parts of what a method says when it refuses an architecture or its data.
REFUSALS = (
    r"hold no token",  # pictures alone
    r"(reads no tokens|does not run on text alone)",
    r"inputs must be prompts, token ids or model inputs; got list \[\]",
    r"no token id: this model's ids run from 0 to -1",
    r"no token of the prompt .* could be exchanged",  # without a tokenizer nothing is a word
    r"norms (or scales|what) .* (not a sum|together)",  # post-norms: no parts of a sum
    r"(not|no) linear",
    r"does not read a sum of stream and heads",
    r"does not (predict|go on)",  # bidirectional
    r"has no vocabulary read-out",
    r"does not exist on",  # a site that the architecture lacks
    r"adds the residual stream itself",
    r"has no read-out of classes",
    r"there is nothing to train on",  # pictures alone
)


def allowed(reason: str) -> bool:
    """Whether a test may be skipped for this."""
    return any(re.search(pattern, reason) for pattern in (*MACHINE, *CROSS))


def listed(refusal: str) -> bool:
    """Whether a method may refuse a subject with these words; fewer than seven are no reason."""
    return len(refusal.split()) >= 7 and any(re.search(part, refusal) for part in REFUSALS)
