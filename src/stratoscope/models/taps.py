"""Taps: readers and editors of sites, carried by ordinary PyTorch hooks that exist only while
someone listens.

One hook per module and side, however many listeners: at a site all edits run first, outermost
context first, then all reads, so that a reader always sees what the model goes on with. `trace` and
`intervene` are built on this. All LMs around one model share its taps; one thread at a time may use
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from stratoscope.errors import InputError, SiteError
from stratoscope.models import longrope
from stratoscope.models.attention import seam
from stratoscope.models.batch import Batch
from stratoscope.models.family import Point
from stratoscope.models.layout import Layout
from stratoscope.models.run import Run
from stratoscope.models.sites import GLOBAL_POINTS, POINTS, Site


class StopForward(Exception):
    """Raised by a reader that has all it wants; the LM ends the forward pass there."""


Edit = Callable[[Tensor, Run], Tensor]
Read = Callable[[Tensor, Run], None]
_ORDER = {point: number for number, point in enumerate([*POINTS, *GLOBAL_POINTS])}
_LOCK = Lock()


class Hook:
    """A PyTorch hook of one model's taps. A deep copy of the model, made while it is up, gets one
    that does nothing."""

    def __init__(self, taps: Taps, call: Callable[..., Any]) -> None:
        self.taps, self.call = taps, call

    def __call__(self, *given: Any) -> Any:
        self.taps.refuse_other_threads()
        return self.call(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*given: Any) -> None:
    return None


class Taps:
    """The listeners of one model. `using` adds some for the length of a block."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.run = Run()
        self.listening: list[tuple[Mapping[Site, list[Edit]], Mapping[Site, list[Read]]]] = []
        # edits that are open, numbered, as provenance tells them
        self.declared: list[tuple[int, Mapping[str, Any]]] = []
        self._number = 0
        # what enters a layer, or a module inside it that a sum begins with
        self._stream: dict[tuple[str, int, str], Tensor] = {}
        self._open = ExitStack()
        self._thread, self._depth = 0, 0
        self._training: list[nn.Module] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy listens to the copied model, and nobody to it
        return taps_of, (self.model, self.layout)

    @contextmanager
    def using(
        self,
        edits: Mapping[Site, list[Edit]] | None = None,
        reads: Mapping[Site, list[Read]] | None = None,
    ) -> Iterator[Run]:
        """Listen inside the block. Sites must be resolved and exist (`LM.sites`); everything is
        undone on any exit.

        Raises InputError for a compiled model, and while another thread uses it.
        """
        mine = (edits or {}, reads or {})
        if not self.listening:
            refuse_compiled(self.model)
        with self._mine():
            self.listening.append(mine)
            try:
                self._install()
                yield self.run
            finally:
                self.listening = [other for other in self.listening if other is not mine]
                self._stream.clear()
                self._install()

    @contextmanager
    def declare(self, **description: Any) -> Iterator[None]:
        """Inside the block an edit is at work, which provenance tells so."""
        self._number += 1
        mine = (self._number, description)
        self.declared.append(mine)
        try:
            yield
        finally:
            self.declared = [other for other in self.declared if other is not mine]

    @contextmanager
    def only(
        self, *listening: tuple[Mapping[Site, list[Edit]], Mapping[Site, list[Read]]]
    ) -> Iterator[None]:
        """Inside the block exactly these listen: for passes whose rows are not what listeners
        outside take them for."""
        with self._mine():
            outer, self.listening = self.listening, list(listening)
            try:
                self._install()
                yield
            finally:
                self.listening = outer
                self._install()

    @contextmanager
    def running(
        self, batch: Batch | None, shift: Tensor | None = None, copies: int = 1
    ) -> Iterator[None]:
        """Say what runs inside the block, so that `-1` means an example's last real token; steps
        count from 0. Each row has the angles that it has alone (`models.longrope`).

        shift: (example,) how far padding moved it. copies: rows of each example.
        """
        with self._mine():
            outer = vars(self.run).copy()
            vars(self.run).update(vars(Run(batch, shift=shift, copies=copies)))
            try:
                with longrope.own_angles(self.model, self.layout.config(), self.run):
                    yield
            finally:
                vars(self.run).update(outer)

    @contextmanager
    def _mine(self) -> Iterator[None]:
        """The model belongs to this thread inside the block, and is in evaluation mode: the same
        model with and without listeners. The outermost block sets training flags back."""
        with _LOCK:
            if self._depth:
                self.refuse_other_threads()
            self._thread, self._depth = get_ident(), self._depth + 1
        try:
            if self._depth == 1 or self.model.training:
                training = [module for module in self.model.modules() if module.training]
                self._training += training
                for module in training:
                    module.training = False
            yield
        finally:
            with _LOCK:
                self._depth -= 1
            if not self._depth:
                for module in self._training:
                    module.training = True
                self._training = []

    def refuse_other_threads(self) -> None:
        """Raises InputError in any thread but the one that listens or runs."""
        if self._depth and self._thread != get_ident():
            raise InputError(
                "this model is being run, read or changed by another thread, and what happens "
                "there would reach this "
                "thread too. Give each thread a model of its own (`copy.deepcopy(lm)`), or let "
                "them take turns."
            )

    def _install(self) -> None:
        """Put up exactly the hooks that today's listeners need."""
        self._open.close()
        sites = sorted(
            {s for pair in self.listening for table in pair for s in table},
            key=lambda s: _ORDER[s.point],
        )
        pre: dict[nn.Module, list[tuple[Site, Point]]] = {}
        post: dict[nn.Module, list[tuple[Site, Point]]] = {}
        inside: dict[nn.Module, Callable[[str, Tensor], Tensor]] = {}
        remember = {
            self.layout.layer(s): (s.tower, s.layer, "") for s in sites if s.layer is not None
        }
        for site in sites:
            module, point = self.layout.locate(site)
            if point.where == "seam":
                kind = site.point.partition(".")[0]
                inside[module] = lambda name, x, at=site, kind=kind: self._fire(
                    Site(at.tower, at.layer, f"{kind}.{name}"), x
                )
            else:
                (pre if point.where == "input" else post).setdefault(module, []).append(
                    (site, point)
                )
            if site.layer is not None and site.point not in ("resid_pre", "resid_post"):
                pre.setdefault(self.layout.layer(site), [])
            if point.where == "sum":
                start = self.layout.start(site, point)
                pre.setdefault(start, [])
                remember[start] = (site.tower, site.layer, point.start)
        for module, here in pre.items():
            hook = Hook(self, self._before(here, remember.get(module)))
            self._open.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, here in post.items():
            # first of all: Transformers collects hidden states by hooks of its own, and LLaVA goes
            # on with those
            self._open.callback(
                module.register_forward_hook(Hook(self, self._after(here)), prepend=True).remove
            )
        if self.listening:
            count = Hook(self, self._count)
            self._open.callback(
                self.model.register_forward_pre_hook(count, with_kwargs=True, prepend=True).remove
            )
        if inside:
            self._open.enter_context(seam(self.model, inside))

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.run.note(module, args, kwargs, self.layout.family.names)

    def _before(
        self, here: list[tuple[Site, Point]], stream: tuple[str, int, str] | None
    ) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            name = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            value = original = args[0] if args else kwargs[name]
            for site, point in here:
                value = self._through(site, point, value)
            if stream is not None:
                self._stream[stream] = value
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
        """Show listeners the site's value in canonical axes; return the module's own tensor, edited
        where they did."""
        place = (site.tower, site.layer, point.start)
        start = self._stream.get(place) if point.where == "sum" else None
        scale = self.layout.scale(site, point)
        scaled = x if scale is None else x * scale
        shown = canonical(
            site,
            point,
            scaled if start is None else start.reshape(scaled.shape) + scaled,
            self._heads(site),
            self._rows(site),
        )
        changed = self._fire(site, shown)
        if changed is shown and (shown is x or not shown.requires_grad):
            # with gradients the model must go on with the very tensor that is shown, not one beside
            # it
            return x
        if start is not None or scale is not None:  # the model will scale, and add `start`, again
            back = changed.reshape(x.shape)
            back = back if start is None else back - start.reshape(back.shape)
            return (back if scale is None else back / _invertible(scale, site)).to(x.dtype)
        if (columns := point.within(x.shape[-1])) is not None:
            start, stop = columns
            own = changed.reshape(*x.shape[:-1], stop - start)
            return torch.cat([x[..., :start], own, x[..., stop:]], dim=-1).to(x.dtype)
        return changed.reshape(x.shape).to(x.dtype)

    def _heads(self, site: Site) -> int:
        return self.layout.dims[site.tower].heads if site.point in ("attn.z", "cross.z") else 0

    def _rows(self, site: Site) -> int:
        before = self._stream.get((site.tower, site.layer, ""))
        return 1 if before is None or before.ndim == 2 else before.shape[:-2].numel()


# by the model's id: taps hold their model
_TAPS: WeakValueDictionary[int, Taps] = WeakValueDictionary()


def taps_of(model: nn.Module, layout: Layout) -> Taps:
    """The taps of a model, one for all LMs that name its sites alike."""
    taps = _TAPS.get(id(model))
    if taps is None or (taps.layout.family, taps.layout.layers) != (
        layout.family,
        layout.layers,
    ):  # or was cut
        taps = _TAPS[id(model)] = Taps(model, layout)
    return taps


def refuse_compiled(model: nn.Module) -> None:
    """Raises InputError where a part is compiled: compiled code does not see hooks that come after
    it."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            problem = (
                f"`{name}` ({type(module).__name__})" if name else f"this {type(module).__name__}"
            )
            raise InputError(
                f"{problem} is compiled (torch.compile): compiled code runs past readers and "
                "interventions, which would "
                f"do nothing. Wrap the model before compiling it, or a copy loaded anew."
            )


def _invertible(scale: Tensor | float, site: Site) -> Tensor | float:
    if scale == 0 if isinstance(scale, (float, int)) else bool((scale == 0).any()):
        raise SiteError(
            f"`{site}` cannot be edited: the layer's scale, which comes after it, is zero in "
            "places."
        )
    return scale


def canonical(site: Site, point: Point, x: Tensor, heads: int, rows: int) -> Tensor:
    """The module's tensor seen with the site's axes: chunk taken, example axis restored, heads
    split."""
    if (columns := point.within(x.shape[-1])) is not None:
        x = x[..., slice(*columns)]
    if x.ndim == 4 and "head" not in site.axes and "kv_head" not in site.axes:
        x = x.flatten(0, 1)  # an example's rows (PatchTST's channels) on an axis of their own
    # some models drop the example axis inside a layer, or flatten all images into one row
    if x.ndim == 2:
        x = x[:, None] if site.point == "logits" else x.reshape(rows, -1, x.shape[-1])
    return x.unflatten(-1, (heads, -1)) if heads else x


def _tensor_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output[_logits(output)]


def _logits(output: Any) -> str:
    # BertForPreTraining has two read-outs
    return "logits" if "logits" in output else "prediction_logits"
