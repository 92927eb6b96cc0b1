"""Bigram subnetwork: the weights with which alone the model says what a table of bigrams does.

Paper: bigram-subnetworks

    table(v | t)  = 0.9 share of v among what follows t in a corpus + 0.1 its share of all tokens
    loss          = - mean over positions of sum_v table(v | token) log p(v; weights w m)
                    + sparsity / N * sum m
    correlation   = Pearson's r, over predictions, of -log p(next; kept weights) and
                    -log table(next | token)

`engine.mask_search` says how m becomes a mask; `fit` gives that mask, `measure` tells where its
weights lie and how near it comes to the table, on other texts. `editing.keep_weights` makes an edit
of it, with these weights alone or without them.

null: as many weights in every matrix, at random: a random mask over all weights would be beaten by
any that knows which matrix matters.
Reads as: how few weights are enough for the simplest prediction there is, and in which layers they
are. Does not show that the whole model predicts through them (switch them off for that), nor
anything about a model that hardly does more than bigrams: compare `whole_correlation`.
Cost: `steps` forward and backward passes of batch_size windows of 128 tokens; six numbers a weight.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.circuits._bigrams import Bigrams as Bigrams
from stratoscope.circuits._bigrams import count as count
from stratoscope.circuits._bigrams import counted as counted
from stratoscope.circuits._bigrams import rows_of
from stratoscope.engine.mask_search import refuse, train_mask
from stratoscope.engine.masks import (
    COMPONENTS,
    Mask,
    applied,
    chance_shared,
    matrices,
    random_like,
    shared,
)
from stratoscope.engine.train import epoch_rows
from stratoscope.errors import InputError, ResultError
from stratoscope.maths import resample
from stratoscope.models.lm import LM
from stratoscope.results import dataset

CONTEXT = 128  # tokens of a window that the search is shown
AT_ONCE = 2**25  # logits that are held at the same time
NULL = "as many weights in every matrix, at random"


def correlation(
    one: Float[Tensor, "example position"],
    other: Float[Tensor, "example position"],
    examples: Any = slice(None),
) -> float:
    """Pearson's r over all places of these examples that are numbers in both; 0 where one of the
    two is the same everywhere."""
    pair = torch.stack([one[examples].flatten(), other[examples].flatten()]).double()
    pair = pair[:, ~pair.isnan().any(dim=0)]
    flat = bool((pair == pair[:, :1]).all(dim=1).any())
    return 0.0 if flat else float(torch.corrcoef(pair)[0, 1])


def fit(
    lm: LM,
    inputs: Any,
    *,
    table: Bigrams | None = None,
    sparsity: float = 10.0,
    rate: float = 1e-2,
    growth: float = 1.005,
    steps: int = 800,
    batch_size: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Mask:
    """The mask of the weights that are kept.

    inputs: texts; they are cut into windows of 128 tokens, shown in an order drawn by the seed.
    table: what `count` made of a corpus, default of these texts. sparsity: what keeping all weights
    costs, in nats; the larger, the fewer stay. rate, growth, steps: of the search, which may end
    earlier. folder: where it is kept; a search that was killed is gone on with by the same call.
    Raises SiteError for a model that does not predict the next token or has layers without
    attention; InputError for fewer windows than a batch; ResultError for a folder with another fit.
    """
    refuse(lm)
    rows = rows_of(lm, inputs)
    table = counted(lm, rows) if table is None else table
    shown = [row[at : at + CONTEXT] for row in rows for at in range(0, len(row), CONTEXT)]
    if not 1 <= batch_size <= len(shown):
        raise InputError(
            f"batch_size={batch_size} of {len(shown)} windows of {CONTEXT} tokens: give more text, "
            "or smaller batches."
        )
    search = {"sparsity": sparsity, "rate": rate, "growth": growth, "steps": steps, "seed": seed}
    about = {"fit": "circuits.bigram_subnetwork", "batch_size": batch_size, **search}
    about |= {"weights": lm.provenance["weights"], "data": _digest(shown, table)}
    place = None if folder is None else Path(folder)
    if place is not None and (place / "fitted.json").is_file():
        return _same(Mask.load(place), about, place)
    work = None if place is None else place / f".making-{_digest([], table, repr(about))}"

    def batches(step: int) -> list[list[int]]:
        return [shown[n] for n in epoch_rows(len(shown), batch_size, step, seed).tolist()]

    made = train_mask(lm, batches, table, **search, folder=work)
    mask = replace(made, settings=about)
    if place is not None and work is not None:
        mask.save(place)
        shutil.rmtree(work, ignore_errors=True)
    return mask


def measure(
    lm: LM,
    inputs: Any,
    *,
    mask: Mask | str | Path,
    table: Bigrams | str | Path,
    other: Mask | str | Path | None = None,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """kept and size (layer, component), in weights; how near the kept weights come to the table.

    surprisal, whole_surprisal, table_surprisal (example, position): nats of each token by the kept
    weights, the whole model and the table, NaN for each text's first. divergence, whole_divergence
    (example): mean over positions of KL(table | model), in nats. correlation, whole_correlation: of
    the kept weights' and the whole model's surprisal with the table's; correlation_low, _high: 95 %
    over texts, NaN for fewer than 40; null_correlation (draw). other: a second mask; then `overlap`
    is the share of the kept weights that it keeps too, with null_overlap (draw).

    inputs: texts that neither the mask nor the table is of. mask, table, other: what `fit` and
    `count` gave, or their folders. Raises SiteError for a model that does not predict the next
    token, InputError for a text of one token or a mask of another model.
    """
    refuse(lm)
    mask = Mask.load(mask) if isinstance(mask, (str, Path)) else mask
    other = Mask.load(other) if isinstance(other, (str, Path)) else other
    table = Bigrams.load(table) if isinstance(table, (str, Path)) else table
    batch = lm.batch(inputs)
    rows = rows_of(lm, batch)
    if short := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise InputError(f"texts {short} have one token: nothing follows it. Give longer ones.")
    with applied(lm, mask):
        own, by_table, near = _told(lm, rows, table)
    whole, _, far = _told(lm, rows, table)
    drawn = []
    for draw in range(draws):
        with applied(lm, random_like(mask, draws * seed + draw)):
            drawn.append(correlation(_told(lm, rows, table)[0], by_table))
    found = resample.percentile(
        lambda some: correlation(own, by_table, some), np.arange(len(rows)), seed=seed
    )
    kept, size = _by_component(lm, mask)
    numbers = {
        "kept": (("layer", "component"), kept),
        "size": (("layer", "component"), size),
        "surprisal": (("example", "position"), own),
        "whole_surprisal": (("example", "position"), whole),
        "table_surprisal": (("example", "position"), by_table),
        "divergence": (("example",), near),
        "whole_divergence": (("example",), far),
        "correlation": ((), found.value),
        "correlation_low": ((), found.low),
        "correlation_high": ((), found.high),
        "whole_correlation": ((), correlation(whole, by_table)),
        "null_correlation": (("draw",), drawn),
    }
    if other is not None:
        numbers["overlap"] = ((), shared(mask, other))
        numbers["null_overlap"] = (("draw",), chance_shared(mask, other, draws=draws, seed=seed))
    return dataset(
        numbers,
        method="circuits.bigram_subnetwork",
        provenance=lm.provenance,
        settings={"mask": dict(mask.settings), "draws": draws},
        seed=seed,
        coords=batch.coords()
        | {"layer": list(range(lm.dims.layers)), "component": list(COMPONENTS)},
        null_kind=NULL,
    )


@torch.no_grad()
def _told(lm: LM, rows: Sequence[Sequence[int]], table: Bigrams) -> tuple[Tensor, Tensor, Tensor]:
    """Surprisals by the model as it is now and by the table, (example, position), and the
    divergence of the two (example,), on the CPU."""
    nats = torch.full((2, len(rows), max(map(len, rows))), torch.nan)
    apart = torch.zeros(len(rows))
    size = max(1, AT_ONCE // (nats.shape[2] * lm.dims.vocab))
    for begin in range(0, len(rows), size):
        batch = lm.batch([list(row) for row in rows[begin : begin + size]])
        ids, real = batch.text
        said, wanted = lm(batch)["logits"].float().log_softmax(dim=-1), table(ids)
        sides = torch.stack([said, wanted.log()])
        here, at = slice(begin, begin + len(ids)), ids[None, :, 1:, None].expand(2, -1, -1, 1)
        follows = sides[:, :, :-1].gather(3, at)[..., 0].masked_fill(~real[:, 1:], torch.nan)
        nats[:, here, 1 : ids.shape[1]] = -follows.cpu()
        gap = (wanted * (sides[1] - said)).sum(dim=-1).masked_fill(~real, 0)
        apart[here] = (gap.sum(dim=1) / real.sum(dim=1)).cpu()
    return nats[0], nats[1], apart


def _by_component(lm: LM, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """How many weights are kept and how many there are, (layer, component)."""
    kept, size = (np.zeros((lm.dims.layers, len(COMPONENTS)), dtype=int) for _ in range(2))
    for name, matrix in matrices(lm).items():
        at = matrix.layer, COMPONENTS.index(matrix.component)
        kept[at] += int(mask.keep[name].sum())
        size[at] += mask.keep[name].numel()
    return kept, size


def _digest(rows: Sequence[Sequence[int]], table: Bigrams, more: str = "") -> str:
    made = hashlib.sha256(repr((rows, more)).encode())
    for tensor in table.tensors.values():
        made.update(tensor.numpy().tobytes())
    return made.hexdigest()[:12]


def _same(there: Mask, about: dict[str, Any], place: Path) -> Mask:
    if dict(there.settings) != about:
        raise ResultError(
            f"{place} holds another mask (other texts, settings or weights): give another folder, "
            "or delete this one."
        )
    return there
