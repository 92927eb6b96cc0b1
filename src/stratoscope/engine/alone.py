"""A layer alone: the model's own layers called one by one, on inputs that belong to no run.

What changes when one component hears something else is found by calling its layer with that input;
outer changes (`with intervene(...)` around) are part of every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine import outside
from stratoscope.engine.base import beside_the_stream
from stratoscope.engine.intervene import Intervention
from stratoscope.errors import SiteError
from stratoscope.models.attention import (
    looks_ahead,
    masked,
    repeat_heads,
    scores_of,
    seam,
    softmax_visible,
)
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward


def outer_changes(lm: LM) -> list[Intervention]:
    """The outer changes of one example's run, as changes of each of several variants of it.

    Raises SiteError where a layer alone cannot make them, or where they write into the stream
    beside all components.
    """
    active = outside.changes(lm)
    if active is None:
        raise SiteError(
            "edges are taken by calling layers alone, where what a forward hook or a function does "
            "cannot be followed "
            f"({', '.join(outside.foreign_hooks(lm.model)) or 'an edit that is no Intervention'}): "
            "change sites by "
            "engine.intervene instead."
        )
    for site in (change.site for change in active if change.site != Site("", 0, "resid_pre")):
        if site.point in ("resid_pre", "resid_mid", "resid_post"):
            raise SiteError(
                f"inside a change at `{site}` the residual stream is not the sum of what "
                "components write, so edges do not "
                f"exist. An addition is the same at `{_writer_before(site)}`, where it belongs "
                f"to a component."
            )
    here = [change for change in active if change.examples is None or 0 in change.examples]
    return [replace(c, examples=None, steps=None) for c in here if c.steps is None or 0 in c.steps]


def _writer_before(site: Site) -> Site:
    """Whose write is the last in the stream at a site."""
    if site.point == "resid_mid":
        return Site("", site.layer, "attn.out")
    return Site("", int(site.layer) - (site.point == "resid_pre"), "mlp.out")


@dataclass(frozen=True)
class Heads:
    """q, k, v of several variants of one layer's input, (variant, head, position, head_dim), every
    query head with its own copy of the keys and values it reads; and z from any mixture of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    _rest: tuple[Tensor | None, float, float | None, Tensor | None]
    # changes made outside, of scores, patterns and z of this layer
    _outer: Sequence[Intervention] = ()

    def z(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scaling, softcap, sinks = self._rest
        sinks = None if sinks is None else sinks.reshape(1, -1, 1, 1)
        scores = self._changed("attn.scores", masked(scores_of(q, k, scaling, softcap), mask))
        pattern = self._changed("attn.pattern", softmax_visible(scores, sinks))
        return self._changed("attn.z", (pattern @ v).transpose(1, 2)).transpose(1, 2)

    def _changed(self, point: str, x: Tensor) -> Tensor:
        for change in self._outer:
            x = change.apply(x, Run()) if change.site.point == point else x
        return x


class Layers:
    """The model's own layers, each called alone, on inputs that need not belong to one run:
    (variant, position, dim). Inputs are rounded to the model's own precision, as in its own run.

    The other arguments of a layer (mask, rotary angles) are those of one example, without padding.
    `with layers:` keeps its hooks up for many calls; the whole model does not run inside. causal:
    whether no position hears a later one in this example (of a picture's tokens some models let
    each hear all).
    """

    def __init__(self, lm: LM, batch: Batch) -> None:
        self.lm = lm
        self.outer = outer_changes(lm)
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._modules = lm.layout.layers[""]
        self._parallel = lm.family.towers[""].residual == "parallel"
        self._open: ExitStack | None = None
        self._middle: Tensor | None = (
            None  # what the running layer's MLP is to read; None stops at attention
        )
        self._found: Any = None
        with ExitStack() as stack:
            for layer in self._modules:
                hook = layer.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(outside.unheard(lm))
            stack.enter_context(lm.taps.using())
            # masks are made for the kernel that will read them
            stack.enter_context(seam(lm.model, {}))
            stack.enter_context(torch.no_grad())
            lm(batch)
        tensors = [x for args, kwargs in self._calls for x in (*args, *kwargs.values())]
        ahead = any(isinstance(x, Tensor) and x.ndim == 4 and looks_ahead(x) for x in tensors)
        self.causal = lm.family.towers[""].causal and not ahead

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append(beside_the_stream(args, kwargs))

    def attention(self, layer: int, x: Float[Tensor, "variant position dim"]) -> Heads:
        """q, k, v that the layer computes from x."""
        return self._call(layer, x, None)

    def mlp(
        self, layer: int, x: Float[Tensor, "variant position dim"]
    ) -> Float[Tensor, "variant position dim"]:
        """What the layer's MLP writes when x is what it reads."""
        return self._call(layer, x if self._parallel else x.detach(), x)

    def __enter__(self) -> Layers:
        numbers = range(len(self._modules))
        attentions = {
            self.lm.layout.attention(Site("", n, "attn.q")): partial(self._attend, n)
            for n in numbers
        }
        edits = (
            {} if self._parallel else {Site("", n, "resid_mid"): [self._replace] for n in numbers}
        )
        inside: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
        for change in self.outer:
            if change.site.point in ("attn.q", "attn.k", "attn.v", "mlp.pre", "mlp.act", "mlp.out"):
                inside.setdefault(change.site, []).append(change.apply)
        with ExitStack() as stack:
            stack.enter_context(self.lm.taps.only((inside, {})))
            stack.enter_context(self.lm.taps.running(None))
            stack.enter_context(
                self.lm.taps.using(edits, {Site("", n, "mlp.out"): [self._keep] for n in numbers})
            )
            stack.enter_context(seam(self.lm.model, {}, attentions))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self._middle is not None:  # the MLP is asked, and what attention adds is put aside
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        groups = q.shape[1] // k.shape[1]
        outer = [change for change in self.outer if change.site.layer == layer]
        rest = (mask, scaling, softcap, sinks)
        self._found = Heads(q, repeat_heads(k, groups), repeat_heads(v, groups), rest, outer)
        raise StopForward

    def _replace(self, x: Tensor, run: Run) -> Tensor:
        return x if self._middle is None else self._middle

    def _keep(self, out: Tensor, run: Run) -> None:
        self._found = out
        raise StopForward

    def _call(self, layer: int, x: Tensor, middle: Tensor | None) -> Any:
        if self._open is None:
            with self:
                return self._call(layer, x, middle)
        args, kwargs = self._calls[layer]
        dtype = self.lm.model.dtype
        self._middle, self._found = None if middle is None else middle.to(dtype), None
        try:
            self._modules[layer](x.to(dtype), *args, **kwargs)
        except StopForward:
            return self._found
        finally:
            self._middle = self._found = None
        raise SiteError(
            f"layer {layer} of {self.lm.family.name} ran without reaching its attention or its MLP."
        )
