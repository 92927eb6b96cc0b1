"""Fidelity: how much of what stands at a site a sparse dictionary says, and what the model loses by
what it does not.

Paper: textbook (Bricken et al., "Towards monosemanticity", 2023)

    l0        = mean over tokens of the number of features that are not 0
    fvu       = sum |y - dictionary(x)|^2 / sum |y - m|^2            m = mean of y over `reference`
    recovered = (loss(ablated) - loss(spliced)) / (loss(ablated) - loss)

x and y stand at the sites that the dictionary reads and writes. Spliced, the model goes on with
dictionary(x) in the place of y; ablated, with 0 (`recovered_zero`) or with m (`recovered_mean`).
Zero is far from what the model ever sees at most sites, and flatters: m is the harder null, and the
dictionary that says m alone recovers nothing of it. BOS is read but not counted, and stays as it is
in all arms. Tokens count alike.

Reads as: whether a circuit in these features can stand for the model at all. Does not show that the
features mean anything: so many random directions at so high an l0 recover the loss as well.
Cost: four runs of every text, one of the reference.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.dictionary import Dictionary, flat
from stratoscope.engine.places import Place, seen
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.features._between import Change, between
from stratoscope.features._texts import counted, parts
from stratoscope.maths.loss import next_token_loss
from stratoscope.models import finite, source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset


def recovered(loss: float, spliced: float, ablated: float) -> float:
    """Share of what the ablation costs that the dictionary does not cost; NaN where it costs
    nothing."""
    return (ablated - spliced) / (ablated - loss) if ablated > loss else float("nan")


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, dictionary: Dictionary | str | Path, reference: Any = None
) -> xr.Dataset:
    """l0, fvu and the four losses of every text (example), `firing` of each feature, and over all
    texts `dead` (share of features that never fire), `increase` (nats a token), `recovered_zero`
    and `recovered_mean`.

    inputs: texts of two tokens or more. dictionary: one, or a folder of one. reference: texts for
    the mean m, default the inputs. Raises InputError for a dictionary of another width than the
    model has at its site, or a text of one token; SiteError for a model that does not predict the
    next token.
    """
    _refuse(lm)
    batch = lm.batch(inputs)
    given = dictionary if isinstance(dictionary, Dictionary) else Dictionary.load(dictionary)
    one = given.to(lm.model.device)
    sites = one.sites(lm)
    if int(batch.lengths.min()) < 2:
        raise InputError("a text of one token predicts nothing: give texts of two tokens or more.")
    total, count = (
        _moments(lm, lm.batch(inputs if reference is None else reference), sites[1])
    )  # fmt: skip
    mean = total / count
    said = [_said(lm, part, one, sites, mean) for part in parts(lm, batch)]
    l0, missed, spread = (torch.cat([each[i] for each in said]) for i in range(3))
    fires, tokens = sum(each[3] for each in said), sum(each[4] for each in said)
    arms: dict[str, Change | None] = {
        "loss": None,
        "loss_spliced": lambda x, y: one(x),
        "loss_zero": lambda x, y: torch.zeros_like(y),
        "loss_mean": lambda x, y: mean.to(y).expand_as(y),
    }
    losses = {name: _loss(lm, batch, sites, change) for name, change in arms.items()}
    predictions = (batch.lengths - 1).cpu()
    finite.refuse({f"the {name} of the texts": x for name, x in losses.items()})
    pooled = {n: float((x * predictions).sum() / predictions.sum()) for n, x in losses.items()}
    clean, spliced = pooled["loss"], pooled["loss_spliced"]
    share = {n: recovered(clean, spliced, pooled[f"loss_{n}"]) for n in ("zero", "mean")}
    each = {"l0": l0, "fvu": missed / spread, "predictions": predictions, **losses}
    return dataset(
        {name: (("example",), value) for name, value in each.items()}
        | {"firing": (("feature",), fires / tokens), "dead": ((), (fires == 0).float().mean())}
        | {"increase": ((), spliced - clean)}
        | {f"recovered_{name}": ((), value) for name, value in share.items()},
        method="features.fidelity",
        provenance=lm.provenance,
        settings={
            "kind": one.kind,
            "site_in": str(sites[0]),
            "site_out": str(sites[1]),
            "features": one.features,
            "reference": reference is not None,
        },
        coords={"example_text": batch.coords()["example_text"]} if batch.tokens else {},
        site=str(sites[1]),
        notes="".join(
            f"Putting {what} there costs the model nothing on these texts, so that no share of it "
            "can be recovered. "
            for name, what in (("zero", "0"), ("mean", "the mean"))
            if share[name] != share[name]
        ).strip(),
    )


def _refuse(lm: LM) -> None:
    if not lm.family.towers[""].causal or not lm.family.reads_text:
        raise SiteError(
            f"{lm.family.name} does not predict a next token from those before it: what a "
            "dictionary costs it cannot be said in nats."
        )
    source.refuse(lm, "a text alone has no loss here")
    lm.layout.resolve("logits")


def _moments(lm: LM, batch: Batch, site: Site) -> tuple[Float[Tensor, " dim"], Tensor]:
    """The sum of what stands at a site over counted tokens, and their number."""
    totals, counts = [], []
    for part in parts(lm, batch):
        real = counted(lm, part)
        totals.append(flat(capture(lm, part, site)[site])[real].double().sum(dim=0))
        counts.append(real.sum())
    return torch.stack(totals).sum(dim=0), torch.stack(counts).sum()


def _said(
    lm: LM, batch: Batch, dictionary: Dictionary, sites: tuple[Place, Site], mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each example l0, what is missed and what there is about the mean; of all together how
    often each feature fires, and the tokens."""
    found, real = seen(lm, batch, *sites), counted(lm, batch)
    x, y = (found[site] for site in sites)
    features = dictionary.encode(x)
    active = (features != 0) & real[..., None]
    away = (y - dictionary.decode(features, x).to(y.dtype)).double(), y.double() - mean
    missed, spread = (d.square().sum(dim=-1).masked_fill(~real, 0.0).sum(dim=1) for d in away)
    tokens = real.sum(dim=1)
    l0 = active.sum(dim=-1).sum(dim=1) / tokens
    return l0, missed, spread, active.sum(dim=(0, 1)), tokens.sum()


def _loss(
    lm: LM, batch: Batch, sites: tuple[Place, Site], change: Change | None
) -> Float[Tensor, " example"]:
    """Nats a token of each text, with the change at every token but BOS."""
    found = []
    for part in parts(lm, batch):
        ids, mask = part.text
        real = counted(lm, part)[..., None]

        def instead(x: Tensor, y: Tensor, here: Tensor = real) -> Tensor:
            return y if change is None else torch.where(here, change(x, y).to(y.dtype), y)

        with nullcontext() if change is None else between(lm, *sites, instead):
            logits = outside.own_logits(lm, part)
        found += [
            next_token_loss(logits[n : n + 1], ids[n : n + 1], mask[n : n + 1])
            for n in range(len(part))
        ]
    return torch.stack(found).cpu()
