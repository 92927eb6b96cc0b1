"""INLP: a concept taken out by projecting away, one after another, the directions that linear
probes find it by.

Paper: textbook (Ravfogel et al., "Null it out: guarding protected attributes by iterative nullspace
projection", 2020)

    B = ()
    repeat   w = weights of a probe of the kind on P x,   B = (B, w) orthonormal,   P = 1 - B^T B
    x' = x - B^T B (x - mean)

until a probe on P x is not surely better on held-out texts than guessing the commonest kind, or
`rounds` are over. The paper projects x itself (`centred=False`); about the mean, erasure moves no
mean.

Reads as: as `features.leace`, which it is the rival of: the same kind of eraser, for the same edit.
Does not show that the concept has gone: the probes are the ones tried, a direction is taken whole
however little of the concept lies along it, and what else lies there goes with it.
Cost: one run of the texts up to the site; one probe a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from stratoscope.engine.select import Positions
from stratoscope.errors import InputError
from stratoscope.features._erasure import Eraser, Erasure, Tokens, erasure, probe, vectors
from stratoscope.models.lm import LM

FAINT = 1e-6  # of a probe's largest singular value: below this a direction is rounding


def sure(share: float, n: int) -> float:
    """The share of right answers of n that guessing, right so often, exceeds in 5 % of cases."""
    return share + 1.645 * (share * (1 - share) / n) ** 0.5


def nullspaces(
    x: Float[np.ndarray, "vector dim"],
    kinds: Int[np.ndarray, " vector"],
    held: Int[np.ndarray, " held"],
    *,
    rounds: int,
    strength: float,
) -> tuple[Float[np.ndarray, "rank dim"], list[float]]:
    """Orthonormal directions of one probe after another, and the accuracy on `held` vectors of
    each, the last included, which is not taken out unless `rounds` are over.

    x: about its mean. The scale of x is set to 1, so that `strength` means the same anywhere.
    """
    known = np.setdiff1d(np.arange(len(x)), held)
    scale = np.sqrt((x**2).mean()) or 1.0
    basis, accuracy = np.zeros((0, x.shape[1])), []
    chance = sure(np.bincount(kinds[held]).max() / len(held), len(held))
    for _ in range(rounds):
        seen = (x - (x @ basis.T) @ basis) / scale
        fitted = probe(seen[known], kinds[known], strength)
        accuracy.append(float((fitted.predict(seen[held]) == kinds[held]).mean()))
        if accuracy[-1] <= chance and len(basis):
            break
        own = fitted.coef_ - (fitted.coef_ @ basis.T) @ basis
        _, sizes, rows = np.linalg.svd(own, full_matrices=False)
        basis = np.concatenate([basis, rows[sizes > FAINT * sizes[0]]])
        if len(basis) >= x.shape[1]:
            break
    return basis[: x.shape[1]], accuracy


def fit(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[Any],
    site: str,
    tokens: Tokens = "read",
    rounds: int = 20,
    strength: float = 1.0,
    held_out: float = 0.25,
    centred: bool = True,
    seed: int = 0,
) -> Eraser:
    """The projection that takes a concept out at a site; settings["accuracy"] has that of every
    probe on held-out texts, first to last.

    inputs, labels, tokens: as `features.leace`. rounds: at most so many probes. strength: inverse
    of a probe's penalty. held_out: the share of texts that say when to stop; seed: which. Raises
    InputError for labels that are not one for each, of at least two kinds on both sides.
    """
    if rounds < 1 or not 0 < held_out < 1 or not strength > 0:
        raise InputError(
            f"rounds={rounds}, held_out={held_out}, strength={strength}: at least one round, a "
            "share between 0 and 1, and a penalty above 0."
        )
    x, kinds, text = vectors(lm, inputs, labels, site, tokens)
    texts = np.random.default_rng(seed).permutation(text.max() + 1)
    held = np.flatnonzero(np.isin(text, texts[: max(1, round(held_out * len(texts)))]))
    known = np.setdiff1d(np.arange(len(x)), held)
    if len(set(kinds[known])) < kinds.max() + 1:
        raise InputError(
            f"{len(held)} of {len(x)} vectors are held out, and a kind is left with none: give "
            "more texts, or hold out fewer."
        )
    mean = x.mean(dim=0)
    basis, accuracy = nullspaces((x - mean).numpy(), kinds, held, rounds=rounds, strength=strength)
    right = torch.tensor(basis).float()
    return Eraser(
        site=str(lm.layout.resolve_one(site)),
        mean=(mean if centred else torch.zeros_like(mean)).float(),
        left=right.T.contiguous(),
        right=right,
        provenance=lm.provenance,
        settings={
            "method": "features.inlp",
            "kinds": int(kinds.max()) + 1,
            "texts": len(texts),
            "vectors": len(x),
            "tokens": tokens,
            "rounds": rounds,
            "strength": strength,
            "held_out": held_out,
            "centred": centred,
            "accuracy": accuracy,
        },
        seed=seed,
    )


def edit(
    lm: LM,
    request: Eraser | str | Path | Sequence[Eraser | str | Path],
    *,
    positions: Positions = None,
) -> Erasure:
    """An edit that erases: as `features.leace.edit`, which takes the erasers of both."""
    return erasure(lm, request, positions)
