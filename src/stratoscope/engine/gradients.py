"""Gradients of a metric with respect to sites, with the weights left out of the graph and their
flags restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.intervene import Intervention, intervene
from stratoscope.engine.trace import trace
from stratoscope.errors import InputError, SiteError
from stratoscope.models import finite
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


@contextmanager
def frozen(lm: LM) -> Iterator[None]:
    """Weights take no gradient inside the block: half the work, and works on models frozen or
    quantized anyway.

    Raises InputError under torch.inference_mode, where no graph can be kept.
    """
    made = next(lm.model.parameters(), None)
    if torch.is_inference_mode_enabled() or (made is not None and made.is_inference()):
        raise InputError(
            "gradients were asked for under torch.inference_mode() (or of weights made there), "
            "which keeps no graph: "
            "use torch.no_grad() instead, or load the model outside."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in lm.model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradients(
    lm: LM,
    inputs: Any,
    sites: Sequence[str | Site],
    metric: Callable[[Tensor], Tensor],
    *,
    start: Tensor | None = None,
    interventions: Sequence[Intervention] = (),
) -> tuple[Tensor, dict[Site, Tensor], dict[Site, Tensor]]:
    """One forward and one backward pass.

    metric: what the model says of each example (logits of the next token, of classes: (example,
    output)) -> (example,). start: replaces what enters layer 0 (example, position, dim), e.g. a
    point on a path. Returns the metric, and for every site its value and gradient.
    """
    batch = lm.batch(inputs)
    resolved = lm.layout.resolve(sites)
    last = Site("", lm.dims.layers - 1, "resid_post")
    changed = lm.layout.resolve([change.site for change in interventions])
    whole = any(
        outside.after_the_layers(site) for site in (*resolved, *changed)
    ) or outside.reads_out_anew(lm)
    entry = Site("", 0, "resid_pre")

    def begin(x: Tensor, run: Run) -> Tensor:
        return x if x.requires_grad else x.detach().requires_grad_(True)

    def enter(x: Tensor, run: Run) -> Tensor:
        return begin(x if start is None else start.to(x).detach(), run)

    before = [site for site in resolved if site.tower or site.point in ("embed", "projector")]
    with (
        frozen(lm),
        torch.enable_grad(),
        lm.taps.using(edits={site: [begin] for site in before} | {entry: [enter]}),
        intervene(lm, *interventions),
        trace(lm, *{*resolved, last}, grad=True) as seen,
    ):
        if whole:  # the very logits that stand behind what comes after the layers
            logits = outside.answers(lm, batch)
        else:
            lm(batch)
            logits = lm.readout.of(seen[last], batch)
        value = metric(logits)
        finite.refuse({"the metric whose gradient is asked": value.detach()})
        wanted = [seen[site] for site in resolved]
        taken = torch.autograd.grad(value.sum(), wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, taken)]
    if not bool(torch.stack([g.isfinite().all().cpu() for g in grads]).all()):
        with suppress(SiteError):
            lm.weight("logits")  # refuses a read-out that is broken where the metric does not look
    return (
        value.detach(),
        {s: x.detach() for s, x in zip(resolved, wanted)},
        dict(zip(resolved, grads)),
    )
