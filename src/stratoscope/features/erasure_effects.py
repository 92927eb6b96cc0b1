"""What an erasure does: whether a linear probe still finds the concept, and what the model loses on
texts that have nothing to do with it.

Paper: textbook (Belrose et al., "LEACE: Perfect linear concept erasure in closed form", 2023;
Ravfogel et al., "Null it out", 2020)

    right[text]     = 1 where a probe, fitted to the other parts' erased vectors, tells its kind
    moved           = sum |x' - x|^2 / sum |x - mean|^2                       over the same vectors
    kl[unrelated]   = mean over tokens of  KL(p(next) || p'(next))            p': inside the edit

null: the same KL, of so many random directions taken out in the place of the eraser's.
Reads as: an erasure is good where `right` is no more often 1 than `chance`, the share of the
commonest kind (give both to `maths.resample.interval`), and `kl` stays near its null's. Does not
show that no reader finds it: curved ones may; and texts that the eraser was fitted to say nothing,
for on those a probe falls below chance of itself. Give others.
Cost: 2 x folds probes; 2 + draws runs of the unrelated texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.features._erasure import Eraser, Erasure, Tokens, probe, vectors
from stratoscope.features._texts import parts
from stratoscope.models import finite
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "as many random directions, taken out at the same site"
AXES = {
    "asked": "a vector of a text whose kind a probe was asked for",
    "unrelated": "a text that has nothing to do with the concept that is erased",
}


def held_out(
    x: Float[np.ndarray, "vector dim"],
    kinds: Int[np.ndarray, " vector"],
    text: Int[np.ndarray, " vector"],
    *,
    folds: int,
    strength: float,
    seed: int,
) -> Float[np.ndarray, " vector"]:
    """1 where a probe that has not seen a vector's text tells its kind. x is scaled to mean square
    1 about its mean, so that `strength` means the same anywhere."""
    from sklearn.model_selection import StratifiedGroupKFold

    x = x - x.mean(axis=0)
    x = x / (np.sqrt((x**2).mean()) or 1.0)
    right = np.zeros(len(x))
    split = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for known, asked in split.split(x, kinds, text):
        if len(set(kinds[known])) < kinds.max() + 1:
            raise InputError(
                f"with {folds} parts some probe would not see every kind: give more texts, or "
                "fewer `folds`."
            )
        right[asked] = probe(x[known], kinds[known], strength).predict(x[asked]) == kinds[asked]
    return right


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[Any],
    eraser: Eraser | str | Path,
    unrelated: Any,
    tokens: Tokens = "read",
    folds: int = 5,
    strength: float = 1.0,
    draws: int = 5,
    seed: int = 0,
) -> xr.Dataset:
    """right, right_before (asked,), with and without the erasure; moved, chance; kl (unrelated,);
    null (draw,), the mean KL of random directions.

    inputs, labels, tokens: texts of the concept that the eraser was not fitted to, as its `fit`
    takes them. eraser: one, or a folder of one. unrelated: texts. folds: parts that probes are
    judged on in turn, a text whole in one of them. strength: inverse of a probe's penalty. seed: of
    parts and random directions. Raises InputError for labels that are not one for each, or too few
    of a kind; SiteError for a model that has no vocabulary read-out.
    """
    if lm.readout.kind != "vocab":
        raise SiteError(
            f"{lm.family.name} has no vocabulary read-out: what it says next cannot be compared."
        )
    if draws < 1 or folds < 2:
        raise InputError(f"draws={draws}, folds={folds}: at least 1 draw and 2 parts are needed.")
    one = eraser if isinstance(eraser, Eraser) else Eraser.load(eraser)
    x, kinds, text = vectors(lm, inputs, labels, one.site, tokens)
    how = {"folds": folds, "strength": strength, "seed": seed}
    erased = one(x)
    other = lm.batch(unrelated)
    plain = _said(lm, other, None)
    generator = torch.Generator().manual_seed(seed)
    null = [
        _divergence(plain, _said(lm, other, _random(one, generator))).mean() for _ in range(draws)
    ]
    spread = (x - x.mean(dim=0)).pow(2).sum()
    return dataset(
        {
            "right": (("asked",), held_out(erased.numpy(), kinds, text, **how)),
            "right_before": (("asked",), held_out(x.numpy(), kinds, text, **how)),
            "chance": ((), float(np.bincount(kinds).max() / len(kinds))),
            "moved": ((), (erased - x).pow(2).sum() / spread),
            "kl": (("unrelated",), _divergence(plain, _said(lm, other, one))),
            "null": (("draw",), torch.stack(null)),
        },
        method="features.erasure_effects",
        provenance=lm.provenance,
        settings={
            "folds": folds,
            "strength": strength,
            "draws": draws,
            "rank": one.rank,
            "fitted_by": one.settings.get("method", ""),
        },
        seed=seed,
        coords={
            "kind": (("asked",), kinds.tolist()),
            "asked_text": (("asked",), text.tolist()),
            "unrelated_text": (("unrelated",), list(other.texts or [""] * len(other))),
        },
        site=one.site,
        null_kind=NULL,
    )


def _random(one: Eraser, generator: torch.Generator) -> Eraser:
    """As many random orthonormal directions, about the same mean."""
    basis = torch.linalg.qr(torch.randn(one.left.shape, generator=generator)).Q
    return replace(one, left=basis, right=basis.T.contiguous())


def _said(lm: LM, batch: Batch, one: Eraser | None) -> list[Float[Tensor, "token vocab"]]:
    """Log probabilities of what comes next at every real token, of each text."""
    batch.text  # noqa: B018  refuses what holds no tokens
    said: list[Tensor] = []
    with nullcontext() if one is None else Erasure(lm, [one]):
        for part in parts(lm, batch):
            real = part.text[1]
            said += [row[own] for row, own in zip(lm(part)["logits"].float(), real)]
    finite.refuse({"the model's logits": torch.cat(said)})
    return [row.log_softmax(dim=-1).cpu() for row in said]


def _divergence(plain: list[Tensor], changed: list[Tensor]) -> Float[Tensor, " text"]:
    return torch.stack([
        (p.exp() * (p - q)).sum(dim=-1).mean() for p, q in zip(plain, changed)
    ])  # fmt: skip
