"""An MLP that computes with some of its neurons alone: their rows and columns of its weights are
cut out for the length of its own forward pass, and the whole ones are back when it ends.

Where that would not be the same (several cores in one batch, gradients, someone who reads or
changes neurons, weights that are no plain matrices) the other neurons are masked as they pass
`mlp.act`: the same numbers, and nothing gained.
"""

from __future__ import annotations

from collections.abc import Callable
from posixpath import commonpath
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.models.taps import Hook
from stratoscope.models.weights import is_plain, shape

# (example, position, neuron) activations of prompts -> (example, neuron) which are their core
Find = Callable[[Tensor, Run], Tensor]
Cut = tuple[Any, str, Any, Any]  # who holds it, by which name, the whole, what is cut out


class Mlp:
    """One layer's MLP inside the block.

    module: the smallest one that holds all of it. ends: the projections into its neurons, then the
    one out of them; none where they cannot be cut. core: (row, neuron), one row where all are
    alike. saved: the share of its weights that the last pass did without.
    """

    def __init__(
        self,
        lm: LM,
        site: Site,
        core: Bool[Tensor, "row neuron"] | None,
        find: Find | None,
    ) -> None:
        self.lm, self.site, self.core, self.find, self.saved = lm, site, core, find, 0.0
        self.left_out = 0.0
        self.module, self.ends = _ends(lm, site)
        self.pre = Site(site.tower, site.layer, "mlp.pre")
        self.inner = self.module.forward
        self.cut: list[Cut] = []

    def change(self, act: Tensor, run: Run) -> Tensor:
        """`mlp.act`: the prompt's core found, or the rest of it masked."""
        if act.shape[-1] < self.lm.dims.neurons:  # cut out already
            return act
        if self.find and not run.past:
            self.core, self.cut = self.find(act, run), []
            return act
        if self.core is None or len(self.core) not in (1, len(act)):
            raise InputError(
                "the prompt of these tokens was read before the block or in another batch: its "
                "core is not known. Read it inside the block, or give a core."
            )
        return act * self.core[:, None].to(act)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP with the weights of its core alone, where that is the same."""
        reading = self.find is not None and not self.lm.taps.run.past
        if reading or not self._may_cut():
            self.saved = 0.0
            out = self.inner(*args, **kwargs)
            if reading and self._may_cut():
                self._cut()  # now, so that the first token does not wait for it
            return out
        if not self.cut or any(_moved(*each) for each in self.cut):
            self._cut()  # another edit has put other weights in their place
        self.saved = self.left_out
        try:
            for holder, name, _, narrow in self.cut:
                setattr(holder, name, narrow)
            return self.inner(*args, **kwargs)
        finally:
            for holder, name, whole, _ in self.cut:
                setattr(holder, name, whole)

    def _may_cut(self) -> bool:
        """Whether no neuron has to be there: one core for all rows, no gradients, nobody
        listens."""
        if self.core is None or not self.ends or torch.is_grad_enabled():
            return False
        for edits, reads in self.lm.taps.listening:
            for heard in (edits.get(self.site), reads.get(self.site), edits.get(self.pre)):
                if heard and heard != [self.change]:
                    return False
            if reads.get(self.pre):
                return False
        for end in self.ends:
            for hook in (*end._forward_hooks.values(), *end._forward_pre_hooks.values()):
                if not isinstance(hook, Hook):
                    return False
        return bool(self.cut) or not bool(self.core.all() | (self.core != self.core[:1]).any())

    def _cut(self) -> None:
        assert self.core is not None
        index, neurons = self.core[0].nonzero()[:, 0], self.lm.dims.neurons
        *into, out = self.ends
        self.cut = _columns(out, index)
        for end in into:
            width = end.nf if isinstance(end, Conv1D) else len(end.weight)
            both = [index + start for start in range(0, width, neurons)]  # of two in one matrix
            self.cut += _rows(end, torch.cat(both))
        self.left_out = 1 - len(index) / neurons


def _ends(lm: LM, site: Site) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds a layer's MLP, and its projections into and out of the neurons; none
    where one is no plain matrix, or anything else in the module has a number for each neuron."""
    tower, layer, neurons = lm.layout.tower(site), lm.layout.layer(site), lm.dims.neurons
    out = lm.layout.writers(Site(site.tower, site.layer, "mlp.out"))[0]
    first, _ = lm.layout.locate(Site(site.tower, site.layer, "mlp.pre"))
    path = tower.points["mlp.pre"].path
    both = [each.replace(".", "/") for each in (path, tower.mlp_write[0])]
    module = lm.layout.part(layer, commonpath(both).replace("/", "."))
    beside = [m for m in lm.layout.part(layer, path.rpartition(".")[0]).children() if m is not out]
    ends = [*(m for m in beside if m is first or shape(m) == (shape(first) or 0)), out]
    own = {id(parameter) for end in ends for parameter in end.parameters()}
    others = (parameter for parameter in module.parameters() if id(parameter) not in own)
    whole = all(map(is_plain, ends)) and not any(neurons in other.shape for other in others)
    return module, ends if whole else []


def _rows(end: Any, index: Int[Tensor, " kept"]) -> list[Cut]:
    """What a projection has of some of its outputs."""
    turned = isinstance(end, Conv1D)  # which holds (in, out), and says how many go out
    cuts: list[Cut] = [_narrow(end.weight, int(turned), index, turned=turned)]
    cuts += [] if end.bias is None else [_narrow(end.bias, 0, index, turned=True)]
    return [*cuts, (end, "nf", end.nf, len(index))] if turned else cuts


def _columns(end: Any, index: Int[Tensor, " kept"]) -> list[Cut]:
    """What a projection has of some of its inputs."""
    turned = isinstance(end, Conv1D)
    return [_narrow(end.weight, int(not turned), index, turned=turned)]


def _narrow(parameter: Tensor, axis: int, index: Int[Tensor, " kept"], *, turned: bool) -> Cut:
    """A part of a parameter, laid out as (in, out): so a CPU reads a small matrix a fifth
    faster."""
    part = parameter.data.index_select(axis, index)
    return parameter, "data", parameter.data, part if turned else part.T.contiguous().T


def _moved(holder: Any, name: str, whole: Any, narrow: Any) -> bool:
    """Whether a parameter's numbers are no longer those that were cut."""
    return name == "data" and holder.data_ptr() != whole.data_ptr()
