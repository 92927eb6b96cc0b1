"""Sparse autoencoder: a few features out of many that say what stands at a site.

Paper: textbook (Bricken et al., "Towards monosemanticity", 2023; topk: Gao et al., "Scaling and
evaluating sparse autoencoders", 2024; batchtopk: Bussmann et al., 2024; gated and jumprelu:
Rajamanoharan et al., 2024)

    z = act((x - b_dec) W_enc + b_enc)        x^ = z W_dec + b_dec
    loss = |x - x^|^2 + sparsity * (sum z, of relu; how many are not 0, of jumprelu)
           or with `sparsity` features a token (topk, batchtopk)

`engine.learner` has the losses in full, a gate's own among them.

Vectors are harvested (real tokens without BOS, in an order drawn by the seed) and then learnt from
in several passes; the model runs once, and only up to the site.

Reads as: a list of directions that each speak seldom, as `features.fidelity` on other texts says
how faithfully. Does not show that they are the model's own: on random vectors such features are
found too, and another seed finds others; a planted model is where that can be told.
Cost: one run of the texts up to the site; 6 x dim x width products a vector and pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratoscope.engine.dictionary import Dictionary, Kind, width_at
from stratoscope.engine.places import place
from stratoscope.features._fitting import fitted
from stratoscope.models.lm import LM


def fit(
    lm: LM,
    inputs: Any,
    *,
    site: str,
    width: int | None = None,
    sparsity: int | float | None = None,
    kind: Kind = "topk",
    tokens: int = 200_000,
    steps: int | None = None,
    batch_size: int = 2048,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Dictionary:
    """A dictionary of what stands at a site; `save` writes a folder that SAELens reads.

    inputs: texts, in all `tokens` tokens or more. width: features, default 4 for each number of a
    token. sparsity: of relu and gated what a feature's value costs, of jumprelu what its speaking
    costs (default 1), of topk and batchtopk how many features speak at a token (default 32). steps:
    of batch_size vectors, default three passes. folder: where it is kept; a fit that was killed is
    gone on with by the same call. Raises
    InputError for fewer tokens than asked or settings that cannot be, SiteError for a site that the
    model lacks or that is no vector at a token, ResultError for a folder with another fit,
    MemoryRefusal where the vectors would not fit.
    """
    at = place(lm, site)
    return fitted(
        lm, inputs, method="features.sae", read=at,
        width=4 * width_at(lm, at) if width is None else width,
        sparsity=sparsity, kind=kind, tokens=tokens, steps=steps, batch_size=batch_size, seed=seed,
        folder=folder,
    )  # fmt: skip
