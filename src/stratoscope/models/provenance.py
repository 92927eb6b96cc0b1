"""What a result carries to be repeated: which weights, changed how, run where.

Weights are named by what they were loaded from, or by their hash. Whether they are still those is
asked each time, from where every tensor lies, how often it was written to, and a few of its
numbers: that costs milliseconds, a hash a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from stratoscope.models.taps import Taps

# hooks that change nothing, or each row by itself: ours, Transformers' records of hidden states,
# torch's weight norms
_KNOWN = ("stratoscope.", "transformers.", "torch.nn.utils.")
_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_SAMPLES = 6  # numbers looked at along each axis of a tensor


class Revision:
    """The name of a model's weights: `recorded` as long as they are those, else the hash of what is
    there."""

    def __init__(self, model: nn.Module, recorded: str | None = None) -> None:
        self.model = model
        self._known = {} if recorded is None else {state(model): recorded}
        self._last: tuple[Any, str] | None = None

    def name(self, edits: tuple[int, ...] = ()) -> str:
        """edits: numbers of the weight edits that are open (storage may be used again by the
        next)."""
        now = (edits, state(self.model))
        if not edits and now[1] in self._known:
            return self._known[now[1]]
        if self._last is None or self._last[0] != now:
            self._last = now, weight_hash(self.model)
        if not self._known:
            self._known[now[1]] = self._last[1]
        return self._last[1]


def state(model: nn.Module) -> tuple[Any, ...]:
    """What changes when weights do: identity, place and version of every tensor that is saved with
    the model, and a sample of its numbers (writing through `.data` leaves no other trace)."""
    tensors = list(_saved(model))
    places = tuple(
        (id(x), _place(x), 0 if x.is_inference() else x._version, x.dtype) for x in tensors
    )
    sums: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for x in tensors:
            if x.device.type != "meta":
                # such cannot be taken in steps
                x = x.dequantize() if hasattr(x, "__tensor_flatten__") else x
                every = tuple(slice(None, None, max(1, size // _SAMPLES)) for size in x.shape)
                sums.setdefault(x.device, []).append(x.detach()[every].float().sum())
    return places, *(torch.stack(some).cpu().numpy().tobytes() for some in sums.values())


def _saved(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in model.modules():
        transient = module._non_persistent_buffers_set
        buffers = [x for name, x in module._buffers.items() if name not in transient]
        for x in (*module._parameters.values(), *buffers):
            if x is not None and id(x) not in seen:
                seen.add(id(x))
                yield x


def _place(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor that is several inside
        return 0


def weight_hash(model: nn.Module) -> str:
    """sha256 over parameter names and bytes: the revision of weights that come from no hub."""
    digest = hashlib.sha256()
    for name, value in sorted(_state(model).items()):
        digest.update(name.encode())
        for part in _raw(value):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _state(model: nn.Module) -> dict[str, Any]:
    """What is saved with the model. Asking bitsandbytes' 4-bit layers for it changes their weights
    (0.50, on a CPU), so that a model with such parameters is read as it lies in memory."""
    held = [
        (name, p) for name, p in model.named_parameters(remove_duplicate=False) if p is not None
    ]
    if not any(hasattr(p, "quant_state") for _, p in held):
        return model.state_dict()
    return dict(held) | dict(model.named_buffers())


def _raw(value: Any) -> Iterator[bytes]:
    """The bytes of a weight; of a quantised one those of its parts, codes and scales."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _raw(part)
    elif not isinstance(value, Tensor):
        yield repr(value).encode()
    elif hasattr(value, "__tensor_flatten__"):
        yield from _raw([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif value.is_quantized:
        yield from _raw([value.int_repr(), str(value.qscheme()), value.dequantize().detach()])
    else:
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def changes(taps: Taps) -> list[dict[str, Any]]:
    """What is at work on the model now, readable: edits by their note, interventions by site,
    operation and place, and how many forward hooks of others there are. Empty for the model as it
    is."""
    by_edit: dict[str, list[str]] = {}
    for edits, _ in taps.listening:
        for site, some in edits.items():
            for edit in some:
                by_edit.setdefault(json.dumps(_described(edit)), []).append(str(site))
    listed = [dict(entry) for _, entry in taps.declared]
    listed += [
        {"site": sites[0] if len(sites) == 1 else sites} | json.loads(description)
        for description, sites in by_edit.items()
    ]
    foreign = list(foreign_hooks(taps.model))
    return listed + ([{"foreign_hooks": len(foreign), "at": foreign[:8]}] if foreign else [])


def _described(edit: Callable[..., Any]) -> dict[str, Any]:
    describe = getattr(getattr(edit, "__self__", None), "describe", None)
    if describe is not None:
        return describe()
    more = {}
    if isinstance(edit, partial):
        more, edit = {k: repr(v) for k, v in edit.keywords.items()}, edit.func
    name = f"{edit.__module__}.{getattr(edit, '__qualname__', type(edit).__qualname__)}"
    return {"operation": name.removeprefix("stratoscope."), **more}


def described_value(value: Tensor) -> Any:
    """A number as it is; of more of them the shape and the beginning of their sha256."""
    if value.numel() == 1:
        number = float(value)
        return number if abs(number) < float("inf") else str(number)
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return {"shape": list(value.shape), "sha256": hashlib.sha256(raw).hexdigest()[:16]}


def foreign_hooks(model: nn.Module) -> Iterator[str]:
    """The modules under forward hooks that are not ours and may treat rows differently: nobody
    knows what they do."""
    for name, module in (("every module", registry), *model.named_modules()):
        tables = (
            ("_global_forward_hooks", "_global_forward_pre_hooks")
            if module is registry
            else _TABLES
        )
        if any(_foreign(hook) for table in tables for hook in getattr(module, table).values()):
            yield name or type(module).__name__


def _foreign(hook: object) -> bool:
    return not (getattr(hook, "__module__", None) or type(hook).__module__).startswith(_KNOWN)
