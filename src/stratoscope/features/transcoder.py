"""Transcoder: a few features out of many that say what an MLP makes of what it reads.

Paper: transcoders

    z = act((x - b_dec) W_enc + b_enc)        x what the MLP reads, after its norm
    y^ = z W_dec + b_out                      y what it writes
    loss = sqrt(dim) |y - y^|^2 / |y| + sparsity * sum z (relu), or `sparsity` features a token

An autoencoder's feature says what is there, before or after the MLP; a transcoder's takes the place
of some of the MLP's computation, as a sparse MLP of one hidden layer would. So its weights speak on
any input: `circuits.transcoder_paths` reads from them which earlier feature a feature hears. The
paper's is a relu; all kinds are learnt here, and topk is what is used unless another is asked for.
`features.splice` and `features.fidelity` take a transcoder as they take an autoencoder; with its
error kept, a splice of nothing changes nothing.

Reads as: what the MLP does for a token, in terms that are few. Does not show that the MLP does it
so: held-out `features.fidelity` says how much of the loss it gives back, and a dictionary that says
the mean alone gives back nothing of it. A fit to few tokens keeps more of its error than a fit to
the paper's 60 million.
Cost: one run of the texts up to the layer; 6 x dim x width products a vector and pass.
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
    layer: int,
    width: int | None = None,
    sparsity: int | float | None = None,
    kind: Kind = "topk",
    tokens: int = 200_000,
    steps: int | None = None,
    batch_size: int = 2048,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Dictionary:
    """A transcoder of one layer's MLP; `save` writes a folder that SAELens reads as a transcoder.

    inputs: texts, in all `tokens` tokens or more. width: features, default 4 for each number of a
    token. sparsity: of relu and gated what a feature's value costs, of jumprelu what its speaking
    costs (default 1), of topk and batchtopk how many features speak at a token (default 32). steps:
    of batch_size vectors, default three passes. folder: where it is kept; a fit that was killed is
    gone on with by the same call. Raises InputError for fewer tokens than asked or settings that
    cannot be, SiteError for a layer whose MLP has no neurons, ResultError for a folder with another
    fit, MemoryRefusal where the vectors would not fit.
    """
    read = place(lm, f"layers.{layer}.mlp.in")
    return fitted(
        lm, inputs, method="features.transcoder", read=read,
        written=lm.layout.resolve_one(f"layers.{layer}.mlp.out"),
        width=4 * width_at(lm, read) if width is None else width,
        sparsity=sparsity, kind=kind, tokens=tokens, steps=steps, batch_size=batch_size, seed=seed,
        folder=folder,
    )  # fmt: skip
