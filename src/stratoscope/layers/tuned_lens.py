"""The tuned lens: what the model would predict if it stopped after each layer, read by an affine
map that was trained for that depth.

Paper: textbook (Belrose et al., "Eliciting latent predictions from transformers with the tuned
lens", 2023)

    lens[depth](h) = readout(norm(h + A[depth] h + b[depth]))     h: resid[depth, position]
    loss           = mean over depths and tokens of KL(model's own || lens[depth])
    gain[depth]    = KL of the logit lens - KL of the tuned lens, on texts it was not fitted to

depth counts the layers passed; at n_layers there is nothing to translate, and the lens is the
model's own read-out. A and b begin at 0: an untrained lens is the logit lens. Adam treats each
depth's numbers apart, so that what one depth learns hangs on no other.

Reads as: how early the final prediction can be read off by an affine reader, in nats still missing
at each depth. Does not show that the model has decided by then, nor that it uses what is read: a
map that is fitted on many texts learns as a table what later layers work out (on a planted model of
two hops it says the answer at depth 0). Only a depth that stays far off says something for sure.
Cost: fit, one run of batch_size windows a step, and a read-out of each depth forward and back (of a
vocabulary of 49,152 that is most of it); dim^2 numbers a depth.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stratoscope.engine import outside
from stratoscope.engine.gradients import frozen
from stratoscope.engine.metric import Words, target
from stratoscope.engine.progress import shown
from stratoscope.engine.sweep import Progress
from stratoscope.engine.trace import capture
from stratoscope.engine.train import Recipe, epoch_rows, train
from stratoscope.errors import InputError, ResultError, SiteError
from stratoscope.layers._translators import Translators as Translators
from stratoscope.layers._translators import at_once, divergence, streams
from stratoscope.layers._translators import windows as windows_of
from stratoscope.layers._tuned import TunedLens as TunedLens
from stratoscope.layers._tuned import from_published as from_published
from stratoscope.layers._tuned import lens_of
from stratoscope.layers._tuned import to_published as to_published
from stratoscope.layers.logit_lens import SITES, _parts, _refuse_too_large, _texts, ranked
from stratoscope.maths import resample
from stratoscope.models import source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def fit(
    lm: LM,
    inputs: Any,
    *,
    steps: int = 250,
    batch_size: int = 16,
    context: int = 128,
    rate: float = 1e-3,
    decay: float = 1e-3,
    seed: int = 0,
    folder: str | Path | None = None,
) -> TunedLens:
    """The affine maps of all depths, fitted to what the model itself says at the end.

    inputs: texts, cut into windows of `context` tokens; batch_size windows are shown at a step, in
    an order drawn by the seed. rate: of Adam, falling to a tenth. decay: of the weights, towards
    the logit lens. folder: where it is kept; a fit that was killed is gone on with by the same
    call. Raises SiteError for a model without a vocabulary, InputError for fewer windows than a
    batch, settings that cannot be or a loss that is no number, ResultError for a folder with
    another fit.
    """
    _refuse(lm)
    source.refuse(lm, "windows of one text are run here")
    if outside.reads_out_anew(lm):
        raise InputError(
            "a change at the final norm or the logits, or a hook that is not ours, is at work: a "
            "lens would be fitted to what it makes of the stream. Leave that block first."
        )
    if steps < 1 or rate <= 0 or decay < 0:
        raise InputError(
            f"steps={steps}, rate={rate}, decay={decay}: one step or more, a rate above 0, a decay "
            "of 0 or more."
        )
    windows = windows_of(lm, inputs, context)
    if not 1 <= batch_size <= len(windows):
        raise InputError(
            f"batch_size={batch_size} of {len(windows)} windows of {context} tokens: give more "
            "text, or smaller batches."
        )
    about = {"fit": "layers.tuned_lens", "steps": steps, "batch_size": batch_size, "rate": rate}
    about |= {"decay": decay, "context": context, "seed": seed}
    model = [lm.provenance.get(key) for key in ("weights", "dtype", "changes")]
    about["of"] = hashlib.sha256(repr((about, windows, model)).encode()).hexdigest()[:12]
    place = None if folder is None else Path(folder)
    if place is not None and (place / "fitted.json").is_file():
        return _same(TunedLens.load(place), about, place)
    work = None if place is None else place / f".making-{about['of']}"
    made = Translators(lm.dims.layers, lm.dims.dim, lm.model.device)

    def loss(_: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = epoch_rows(len(windows), batch_size, step, seed).tolist()
        return made.loss(lm, streams(lm, lm.batch([windows[row] for row in rows])))

    recipe = Recipe(
        made, loss, None, None, steps, rate, warmup=max(1, steps // 20), decay=decay,
        betas=(0.9, 0.999), clip=None, training=False,
    )  # fmt: skip
    with frozen(lm), shown("fitting a tuned lens") as progress:
        try:
            story = train(recipe, work, seed=seed, progress=progress)
        except ArithmeticError as error:
            raise InputError(f"{error}: lower the rate, which is {rate}.") from error
    lens = TunedLens(
        weight=made.weight.detach().cpu(),
        bias=made.bias.detach().cpu(),
        curve=story.curve,
        settings=about,
        seed=seed,
        provenance=lm.provenance,
    )
    if place is not None and work is not None:
        lens.save(place)
        shutil.rmtree(work, ignore_errors=True)
    return lens


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    lens: TunedLens | str | Path,
    answer: Words = None,
    top: int = 5,
    foreign: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """What the lens reads at every depth and position, and how far it is from the model's own
    prediction, beside the logit lens.

    inputs: texts that the lens was not fitted to. lens: what `fit` gave, its folder, or one that
    the tuned-lens package published. answer, top, progress: as `layers.logit_lens`. foreign: take
    a lens that was fitted on other weights. Returns probability, token (example, depth, position,
    rank), answer_rank, answer_probability, kl and logit_lens_kl (example, depth, position), in
    nats; their means over texts and `gain`, the logit lens's less the tuned lens's, with _low and
    _high (depth): 95 %, texts being the units, NaN for fewer than five. Raises SiteError for a
    model without a vocabulary, InputError for a bad `top` or a lens of another model, LoadError
    for a folder without one, MemoryRefusal when the result would not fit.
    """
    _refuse(lm)
    if not 1 <= top <= lm.dims.vocab:
        raise InputError(f"top={top}: choose 1 to {lm.dims.vocab}.")
    made, batch = lens_of(lm, lens, foreign=foreign), lm.batch(inputs)
    wanted = target(lm, batch, answer, single="each layer is read as the next token")
    _refuse_too_large(lm, batch, top)
    real, depths = batch.text[1].cpu(), lm.dims.layers + 1
    shape = (len(batch), depths, real.shape[1])
    numbers = [torch.full((*shape, top), torch.nan), torch.zeros(*shape, top, dtype=torch.long)]
    numbers += [torch.full(shape, torch.nan) for _ in range(4)]
    done, total = 0, depths * int(real.sum())
    for where, part in _parts(lm, batch):
        seen = capture(lm, part, *SITES)
        held = [seen[site] for site in lm.layout.resolve(SITES)]
        say, (e, p) = _reader(lm, part), part.text[1].nonzero(as_tuple=True)
        for at in zip(e.split(at_once(lm)), p.split(at_once(lm))):
            own = say(held[-1], at, lambda x: x)
            asked = wanted.answer.to(own.device)[where][at[0]]
            for depth, resid in enumerate(held):
                said = say(resid, at, partial(made, depth=depth)).float()
                plain = say(resid, at, lambda x: x)
                pieces = (
                    *ranked(said, asked, top), divergence(own, said), divergence(own, plain)
                )  # fmt: skip
                place = (at[0].cpu() + where.start, depth, at[1].cpu())
                for table, piece in zip(numbers, pieces):
                    table[place] = piece.to(table)
                done += len(at[0])
                if progress:
                    progress(done, total)
    names = ("answer_rank", "answer_probability", "kl", "logit_lens_kl")
    axes, kinds = ("example", "depth", "position"), dict(zip(names, numbers[2:]))
    return dataset(
        {"probability": ((*axes, "rank"), numbers[0])}
        | {"token": ((*axes, "rank"), _texts(lm, numbers[1], real))}
        | {name: (axes, table) for name, table in kinds.items()}
        | _means(kinds["kl"].double().numpy(), kinds["logit_lens_kl"].double().numpy()),
        method="layers.tuned_lens",
        provenance=lm.provenance,
        settings={"top": top, "lens": dict(made.settings)},
        coords=batch.coords()
        | wanted.coords
        | {"depth": list(range(depths))}
        | {"read_at": (("example",), lm.readout.positions(batch).cpu())},
        notes=" ".join(wanted.notes),
    )


Say = Callable[[Tensor, tuple[Tensor, Tensor], Callable[[Tensor], Tensor]], Tensor]


def _reader(lm: LM, part: Batch) -> Say:
    """Logits of some tokens of a stream (example, position, dim) that a function has changed."""
    if outside.reads_out_anew(lm):  # a change after the layers: then by whole runs
        return lambda resid, at, change: outside.read_out(lm, part, change(resid))[at]
    return lambda resid, at, change: lm.readout(change(resid[at]))


def _means(tuned: np.ndarray, plain: np.ndarray) -> dict[str, tuple[tuple[str, ...], list[float]]]:
    """Means over texts of (example, depth, position), each with its interval."""
    found = {}
    kinds = {"mean_kl": tuned, "mean_logit_lens_kl": plain, "gain": plain - tuned}
    for name, values in kinds.items():
        rows = [resample.interval(each) for each in np.nanmean(values, axis=2).T]
        found |= {
            name: (("depth",), [row.value for row in rows]),
            f"{name}_low": (("depth",), [row.low for row in rows]),
            f"{name}_high": (("depth",), [row.high for row in rows]),
        }
    return found


def _refuse(lm: LM) -> None:
    if lm.readout.kind != "vocab":
        raise SiteError(
            f"{lm.family.name} has no vocabulary read-out here ({lm.readout.kind}): a lens has no "
            "words to say."
        )


def _same(there: TunedLens, about: dict[str, Any], place: Path) -> TunedLens:
    if dict(there.settings) != about:
        raise ResultError(
            f"{place} holds another lens (other texts, settings or weights): give another folder, "
            "or delete this one."
        )
    return there
