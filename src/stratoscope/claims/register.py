"""What was expected before it was measured: `papers/registrations/KEY.jsonl`, one line a claim,
only ever appended to and committed before the claim is run.

    stratoscope claim KEY --register     then commit, then measure

A verdict is *confirmatory* if its registration lay in the commit it was measured in, with no change
beside it, for that subject and seed, and with the claim as it was registered: its comparisons, its
nulls, its number of units and its body. Any other verdict is *exploratory*. What a verdict says of
itself is not believed: `unproven` asks git whether the line of the registration is older than the
line of the verdict, which a rebase does not change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stratoscope.claims import code, verdicts
from stratoscope.claims.claim import Claim
from stratoscope.claims.paper import Paper
from stratoscope.claims.verdict import Verdict
from stratoscope.errors import ClaimError

FOLDER = "registrations"
NOT_YET = "0" * 40  # what git calls a line that is not committed


def write(
    paper: Paper, claims: Iterable[Claim], seeds: Sequence[int], known: Iterable[Verdict] = ()
) -> Path:
    """Register claims for these seeds, each on its subject; return the file, which is to be
    committed.

    known: verdicts that there are. A seed on which the claim was measured before, by whatever
    words, is left out: what is known already cannot be foretold. Raises ClaimError when no seed is
    left, or the file cannot be written.
    """
    file = file_of(paper)
    seen = {(verdict.claim, verdict.subject, verdict.seed) for verdict in known}
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for claim in claims:
        free = [seed for seed in seeds if (claim.name, claim.subject, seed) not in seen]
        if not free:
            raise ClaimError(
                f"{claim.name} was measured on {claim.subject} on all of the seeds "
                f"{', '.join(map(str, seeds))}: what is known cannot be registered. Take others."
            )
        record = {"key": paper.key, "claim": claim.name, "subject": claim.subject}
        record |= {"digest": digest(paper, claim), "expect": claim.expect}
        record |= {"direction": claim.direction, "valid": claim.valid, "we_expect": claim.we_expect}
        record |= {"null": dict(claim.null), "n": claim.n, "seeds": free, "date": now}
        try:
            verdicts.add(file, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise ClaimError(
                f"The registration of {claim.name} could not be written to {file} "
                f"({error.strerror or error}). A claim is registered in a checkout of the source."
            ) from error
    return file


def file_of(paper: Paper) -> Path:
    """Where the registrations of a paper stand: beside its file."""
    return paper.path.parent / FOLDER / f"{paper.key}.jsonl"


def digest(paper: Paper, claim: Claim) -> str:
    """Twelve characters that change with anything that is promised: comparisons, nulls, units, and
    the body that measures them."""
    body = code.of_claim(paper.path, claim.name)
    promised = (claim.name, claim.subject, claim.expect, claim.direction, claim.valid)
    promised += (claim.we_expect, sorted(claim.null.items()), claim.n, body)
    return hashlib.sha256(repr(promised).encode()).hexdigest()[:12]


def beforehand(paper: Paper, claim: Claim, seed: int) -> str:
    """The digest of the claim's registration for this seed, if the commit we are in holds it and no
    file of the source differs from that commit; else "".
    """
    root = _root(paper.path)
    if root is None or code.commit(root).endswith("+"):
        return ""
    path = file_of(paper).relative_to(root)
    wanted = digest(paper, claim)
    for line in _git(root, "show", f"HEAD:{path.as_posix()}").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("digest") == wanted and seed in record.get("seeds", ()):
            return wanted
    return ""


def unproven(every: Iterable[Verdict], folder: Path) -> list[str]:
    """What is wrong, in sentences, with verdicts that say they were registered, by git's history of
    `folder`, the papers' own. Nothing outside a checkout, or where its history was cut off."""
    root = _root(folder)
    registered = sorted((v for v in every if v.registered), key=lambda v: v.key)
    if (
        not registered
        or root is None
        or _git(root, "rev-parse", "--is-shallow-repository") != "false"
    ):
        return []
    problems = []
    for key, group in itertools.groupby(registered, key=lambda v: v.key):
        promised = _arrived(root, folder / FOLDER / f"{key}.jsonl", lambda line: line["digest"])
        measured = _arrived(root, folder / "verdicts" / f"{key}.jsonl", _run)
        problems += [
            f"{key}: the verdict on {v.claim} (seed {v.seed}, {v.date}) says that it was "
            "registered, and git has no older commit with that registration"
            for v in group
            if not _before(
                root,
                promised.get(v.registered, NOT_YET),
                measured.get((v.claim, v.subject, v.seed, v.date), NOT_YET),
            )
        ]
    return problems


def _run(line: dict[str, Any]) -> tuple[str, str, int, str]:
    return line["claim"], line["subject"], line["seed"], line["date"]


def _before(root: Path, first: str, then: str) -> bool:
    """Whether one commit is an ancestor of another, which may be still to come."""
    if first in (NOT_YET, then):
        return False
    return then == NOT_YET or _git(root, "merge-base", first, then) == first


def _arrived(root: Path, file: Path, name: Callable[[dict[str, Any]], Any]) -> dict[Any, str]:
    """The commit in which each line of a file arrived, by the name of what the line says; the first
    of several."""
    arrived, commit = {}, NOT_YET
    for line in _git(root, "blame", "--line-porcelain", "--", str(file)).splitlines():
        if re.match(r"[0-9a-f]{40} ", line):
            commit = line[:40]
        elif line.startswith("\t{"):
            arrived.setdefault(name(json.loads(line)), commit)
    return arrived


def _root(path: Path) -> Path | None:
    """The checkout a path lies in."""
    return next((p for p in (path, *path.parents) if (p / ".git").exists()), None)


def _git(root: Path, *words: str) -> str:
    """What git says, or "" where it says that it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
