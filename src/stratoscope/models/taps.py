"""Taps: readers and editors of sites, carried by ordinary PyTorch hooks that exist only while someone listens.

One hook per module and side, however many listeners: at a site all edits run first, outermost context first, then all
reads, so that a reader always sees what the model goes on with. `trace` and `intervene` are built on this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stratoscope.errors import SiteError
from stratoscope.models.attention import seam
from stratoscope.models.batch import Batch
from stratoscope.models.family import Point
from stratoscope.models.sites import GLOBAL_POINTS, POINTS, Site

if TYPE_CHECKING:
    from stratoscope.models.lm import LM


class StopForward(Exception):
    """Raised by a reader that has all it wants; the LM ends the forward pass there."""


@dataclass
class Run:
    """What is running: the batch (None when the user calls the Hugging Face model directly), how many forward passes
    came before this one since the model was last started, how far generation shifted each example to the right, and how
    many positions the cache has seen."""

    batch: Batch | None = None
    step: int = 0
    shift: Tensor | None = None
    past: int = 0


Edit = Callable[[Tensor, Run], Tensor]
Read = Callable[[Tensor, Run], None]
_ORDER = {point: number for number, point in enumerate([*POINTS, *GLOBAL_POINTS])}


class Taps:
    """The listeners of one model. `using` adds some for the length of a block."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.run = Run()
        self.listening: list[tuple[Mapping[Site, list[Edit]], Mapping[Site, list[Read]]]] = []
        self._layer_input: dict[tuple[str, int], Tensor] = {}
        self._open = ExitStack()

    @contextmanager
    def using(
        self, edits: Mapping[Site, list[Edit]] | None = None, reads: Mapping[Site, list[Read]] | None = None
    ) -> Iterator[Run]:
        """Listen inside the block. Sites must be resolved and exist (`LM.sites`); everything is undone on any exit."""
        mine = (edits or {}, reads or {})
        training = [module for module in self.lm.model.modules() if module.training]
        self.listening.append(mine)
        try:
            self._install()
            self.lm.model.eval()
            yield self.run
        finally:
            self.listening = [other for other in self.listening if other is not mine]
            for module in training:
                module.training = True
            self._layer_input.clear()
            self._install()

    @contextmanager
    def only(self, *listening: tuple[Mapping[Site, list[Edit]], Mapping[Site, list[Read]]]) -> Iterator[None]:
        """Inside the block exactly these listen: for passes whose rows are not what listeners outside take them for."""
        outer, self.listening = self.listening, list(listening)
        try:
            self._install()
            yield
        finally:
            self.listening = outer
            self._install()

    @contextmanager
    def running(self, batch: Batch | None, shift: Tensor | None = None) -> Iterator[None]:
        """Say what runs inside the block, so that `-1` means an example's last real token; steps count from 0."""
        outer, self.run.batch, self.run.step, self.run.shift = vars(self.run).copy(), batch, 0, shift
        try:
            yield
        finally:
            vars(self.run).update(outer)

    def _install(self) -> None:
        """Put up exactly the hooks that today's listeners need."""
        self._open.close()
        sites = sorted({s for pair in self.listening for table in pair for s in table}, key=lambda s: _ORDER[s.point])
        pre: dict[nn.Module, list[tuple[Site, Point]]] = {}
        post: dict[nn.Module, list[tuple[Site, Point]]] = {}
        inside: dict[nn.Module, Callable[[str, Tensor], Tensor]] = {}
        for site in sites:
            module, point = self.lm.layout.locate(site)
            if point.where == "seam":
                inside[module] = lambda name, x, at=site: self._fire(Site(at.tower, at.layer, name), x)
            else:
                (pre if point.where == "input" else post).setdefault(module, []).append((site, point))
            if site.layer is not None and site.point not in ("resid_pre", "resid_post"):
                pre.setdefault(self.lm.layout.layer(site), [])
        remember = {self.lm.layout.layer(s): (s.tower, s.layer) for s in sites if s.layer is not None}
        for module, here in pre.items():
            hook = self._before(here, remember.get(module))
            self._open.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, here in post.items():
            # first of all: Transformers collects hidden states by hooks of its own, and LLaVA goes on with those
            self._open.callback(module.register_forward_hook(self._after(here), prepend=True).remove)
        if self.listening:
            count = self.lm.model.register_forward_pre_hook(self._count, with_kwargs=True, prepend=True)
            self._open.callback(count.remove)
        if inside:
            self._open.enter_context(seam(self.lm.model, inside))

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pass that finds an empty cache starts anew: step 0."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name until Transformers 5.24, still taken
        self.run.past = 0 if cache is None else int(cache.get_seq_length())
        self.run.step = self.run.step + 1 if self.run.past else 0

    def _before(self, here: list[tuple[Site, Point]], layer: tuple[str, int] | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            name = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            value = original = args[0] if args else kwargs[name]
            for site, point in here:
                value = self._through(site, point, value)
            if layer is not None:
                self._layer_input[layer] = value
            if value is original:
                return args, kwargs
            return ((value, *args[1:]), kwargs) if args else (args, kwargs | {name: value})

        return hook

    def _after(self, here: list[tuple[Site, Point]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            value = original = _tensor_in(output)
            for site, point in here:
                value = self._through(site, point, value)
            if value is original:
                return None
            if isinstance(output, (tuple, list)):
                return type(output)((value, *output[1:]))
            if isinstance(output, Tensor):
                return value
            output[_logits(output)] = value
            return output

        return hook

    def _fire(self, site: Site, value: Tensor) -> Tensor:
        for edits, _ in self.listening:
            for edit in edits.get(site, ()):
                value = edit(value, self.run)
        for _, reads in self.listening:
            for read in reads.get(site, ()):
                read(value, self.run)
        return value

    def _through(self, site: Site, point: Point, x: Tensor) -> Tensor:
        """Show listeners the site's value in canonical axes; return the module's own tensor, edited where they did."""
        start = self._layer_input.get((site.tower, site.layer)) if point.where == "sum" else None
        scale = self.lm.layout.scale(site, point)
        scaled = x if scale is None else x * scale
        shown = canonical(site, point, scaled if start is None else start + scaled, self._heads(site), self._rows(site))
        changed = self._fire(site, shown)
        if changed is shown and (shown is x or not shown.requires_grad):
            return x  # with gradients the model must go on with the very tensor that is shown, not one beside it
        if start is not None or scale is not None:  # the model will scale, and add `start`, again
            back = changed.reshape(x.shape)
            back = back if start is None else back - start
            return (back if scale is None else back / _invertible(scale, site)).to(x.dtype)
        if point.part is not None:
            chunks = list(x.chunk(point.part[1], dim=-1))
            chunks[point.part[0]] = changed.reshape(chunks[point.part[0]].shape)
            return torch.cat(chunks, dim=-1).to(x.dtype)
        return changed.reshape(x.shape).to(x.dtype)

    def _heads(self, site: Site) -> int:
        return self.lm.layout.dims[site.tower].heads if site.point == "attn.z" else 0

    def _rows(self, site: Site) -> int:
        before = self._layer_input.get((site.tower, site.layer))
        return 1 if before is None or before.ndim == 2 else before.shape[0]


def _invertible(scale: Tensor | float, site: Site) -> Tensor | float:
    if scale == 0 if isinstance(scale, (float, int)) else bool((scale == 0).any()):
        raise SiteError(f"`{site}` cannot be edited: the layer's scale, which comes after it, is zero in places.")
    return scale


def canonical(site: Site, point: Point, x: Tensor, heads: int, rows: int) -> Tensor:
    """The module's tensor seen with the site's axes: chunk taken, example axis restored, heads split."""
    if point.part is not None:
        x = x.chunk(point.part[1], dim=-1)[point.part[0]]
    if x.ndim == 2:  # some models drop the example axis inside a layer, or flatten all images into one row
        x = x[:, None] if site.point == "logits" else x.reshape(rows, -1, x.shape[-1])
    return x.unflatten(-1, (heads, -1)) if heads else x


def _tensor_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output[_logits(output)]


def _logits(output: Any) -> str:
    return "logits" if "logits" in output else "prediction_logits"  # BertForPreTraining has two read-outs
