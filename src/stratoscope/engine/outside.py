"""What is at work around a measure: outer interventions, and forward hooks that are not ours.

A measure inside `with intervene(...)`, `with edit:` or under a user's own hook asks about the
changed model. Where it runs the model as it is, that is so by itself; where it runs parts of it on
rows of its own making (packed cells, a layer alone), it has to make the outer changes there too, or
to let the whole model run instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.intervene import Intervention, intervene, replaced
from stratoscope.errors import SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.find_readout import own_output
from stratoscope.models.lm import LM
from stratoscope.models.provenance import foreign_hooks
from stratoscope.models.sites import Site
from stratoscope.models.taps import Read, Run


def changes(lm: LM) -> list[Intervention] | None:
    """The outer changes inside the main stack's layers, outermost first; None when something is
    not an intervention.

    What acts before the first layer (embeddings, projector, a second tower) is left out: the stream
    that enters the first layer has it already. `reads_out_anew` asks for what acts after the last.
    """
    active: list[Intervention] = []
    for edits, _ in lm.taps.listening:
        for site in edits:
            for edit in edits[site] if _inside(site) else ():
                change = getattr(edit, "__self__", None)
                if not isinstance(change, Intervention) or change.site != site:
                    return None
                active.append(change)
    return None if any(foreign_hooks(lm.model)) else active


def reads_out_anew(lm: LM) -> bool:
    """Whether an outer change can act after the last layer: logits are then the model's output."""
    return any(map(after_the_layers, sites(lm))) or any(foreign_hooks(lm.model))


def sites(lm: LM) -> Iterator[Site]:
    """Where changes made outside act."""
    return (site for edits, _ in lm.taps.listening for site in edits if edits[site])


def after_the_layers(site: Site) -> bool:
    """Whether a site lies between the last layer and the logits."""
    return site.tower == "" and site.point in ("final_norm", "logits")


def _inside(site: Site) -> bool:
    return site.tower == "" and site.layer is not None


def own_logits(lm: LM, batch: Batch) -> Tensor:
    """What the model itself gives, all changes made: (example, position, output), or (example,
    output). Raises SiteError for a model that gives no logits."""
    if lm.readout.reason:
        raise SiteError(lm.readout.reason)
    site = Site("", None, "logits")
    # no outer trace may end the pass before
    reads: dict[Site, list[Read]] = {} if lm.layout.lack(site) else {site: [_wait]}
    with lm.taps.using(reads=reads):
        own = own_output(lm, batch)
    if own is None:
        raise SiteError(
            f"{type(lm.model).__name__} gives no logits, so there is nothing to measure."
        )
    return own[..., None] if own.ndim == 2 and lm.readout.where == "every" else own


def answers(lm: LM, batch: Batch) -> Tensor:
    """(example, output): what the model itself says of each example, all changes made."""
    own = own_logits(lm, batch)
    return own if own.ndim == 2 else own[torch.arange(len(batch)), lm.readout.positions(batch)]


def read_out(
    lm: LM, batch: Batch, resid: Float[Tensor, "example position dim"], *, every: bool = True
) -> Float[Tensor, "example *position output"]:
    """What the model makes of a last residual stream, with the changes that come after it, at every
    position or as `answers` does."""
    if not reads_out_anew(lm):
        return lm.readout(resid) if every else lm.readout.of(resid, batch)
    with unheard(lm), intervene(lm, replaced(f"layers.{lm.dims.layers - 1}.resid_post", resid)):
        return own_logits(lm, batch) if every else answers(lm, batch)


def _wait(x: Tensor, run: Run) -> None:
    """A reader that keeps nothing."""


@contextmanager
def unheard(lm: LM) -> Iterator[None]:
    """Outer changes act inside the block, outer readers do not hear it: they have seen their
    run."""
    with lm.taps.only(*((edits, {}) for edits, _ in lm.taps.listening if edits)):
        yield
