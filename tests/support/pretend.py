"""A device that is pretended: tensors whose `device` is cuda:0, kept on the CPU, that refuse to
meet tensors which are not.

It fails where a GPU would: when tensors of two devices meet in one operation, when numpy is asked
for a tensor that is not on the CPU, when a CPU generator draws on the device, when integers are
multiplied as matrices. What a GPU allows is allowed: scalars of the CPU, CPU indices, copies.

`waits` counts what else is dear on a GPU: how often each line of stratoscope makes the host wait
for a value of the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from stratoscope.models import weights

DEVICE = torch.device("cuda:0")
_LIKE = ("zeros", "ones", "full", "empty", "rand", "randn")
_MADE = (*_LIKE, "arange", "eye", "tensor", "as_tensor", "linspace", "randint", "randperm")
FACTORIES = {getattr(torch, name) for name in (*_MADE, *(f"{name}_like" for name in _LIKE))}
NEW = {
    getattr(Tensor, name)
    for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type, Tensor.copy_}
INDEXED = {
    Tensor.__getitem__,
    Tensor.__setitem__,
    torch.index_put,
    Tensor.index_put,
    Tensor.index_put_,
}
READ = {Tensor.numpy, Tensor.__array__}
# a scalar of the CPU is as bad here as a vector
STRICT = {
    torch.stack,
    torch.cat,
    torch.index_select,
    Tensor.index_select,
    torch.searchsorted,
    torch.nn.functional.embedding,
}
PRODUCTS = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("matmul", "mm", "bmm", "mv", "dot", "inner", "addmm", "baddbmm")
} | {torch.einsum, torch.tensordot, torch.nn.functional.linear}
PRODUCTS |= {Tensor.__matmul__, Tensor.__rmatmul__}
ABSENT = {torch.histogram, Tensor.histogram, torch.histogramdd}  # on a GPU
# the host waits until the device has come to the value
WAITED = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "nonzero", "equal", "allclose", "masked_select", "unique")
} | {getattr(torch, name) for name in ("nonzero", "equal", "allclose", "masked_select", "unique")}
WAITED |= {getattr(Tensor, f"__{name}__") for name in ("bool", "float", "int", "index", "contains")}
HOMES = ("/torch/", "/transformers/", "/src/stratoscope/", "/tests/")


class OnDevice(Tensor):
    """A tensor that says it lies on the device."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def there(x: Tensor) -> OnDevice:
    return x.as_subclass(OnDevice)


def plain(x: Any) -> Any:
    return tree_map(lambda t: t.as_subclass(Tensor) if isinstance(t, OnDevice) else t, x)


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation that a tensor of the device, or the device by name, takes part in."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    asked = kwargs.get("device")
    if func is Tensor.__deepcopy__:
        data = args[0].detach().clone()
        return (
            nn.Parameter(data, args[0].requires_grad) if isinstance(args[0], nn.Parameter) else data
        )
    if _counting and _waits(func, args, kwargs):
        _note_line()
    with torch._C.DisableTorchFunctionSubclass():
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func in READ:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first"
            )
        if func in MOVES or func in FACTORIES | NEW:
            return moved(func, args, kwargs, asked)
        refuse_mixed(func, args, kwargs, tensors)
        refuse_absent(func, kwargs, tensors)
        if func is torch.histc:  # a GPU counts integers too: experts do
            args = (args[0].float(), *args[1:])
        found = func(*args, **kwargs)
        if isinstance(found, torch.Size):  # a tree would come back as a plain tuple
            return found
        mutated = func in (Tensor.requires_grad_, Tensor.__setitem__)
        return (
            found
            if mutated
            else tree_map(lambda t: there(t) if isinstance(t, Tensor) else t, found)
        )


def moved(func: Any, args: tuple, kwargs: dict[str, Any], asked: Any) -> Any:
    """Operations whose result lies where they are told, or where their first argument lies."""
    kwargs, args = dict(kwargs), list(args)
    places = [asked] if asked is not None else []
    for place, value in enumerate(args):
        if func is Tensor.to and place and isinstance(value, Tensor):
            places.append(DEVICE if isinstance(value, OnDevice) else "cpu")
            args[place] = value.dtype
        elif func is Tensor.to and place and isinstance(value, (str, torch.device)):
            places.append(value)
            args[place] = torch.device("cpu")
    if "device" in kwargs:
        kwargs["device"] = None if func in FACTORIES | NEW else torch.device("cpu")
    on = (
        isinstance(args[0], OnDevice) and func not in (torch.tensor, torch.arange)
        if args
        else False
    )
    if func is Tensor.cpu:
        on = False
    if places:
        on = torch.device(places[-1]).type == "cuda"
    if on and kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    found = func(*(plain(a) for a in args), **plain(kwargs))
    if func is Tensor.copy_:
        return args[0]
    return there(found) if on else found


def refuse_mixed(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    far = [t for t in tensors if isinstance(t, OnDevice)]
    near = [t for t in tensors if not isinstance(t, OnDevice) and (t.ndim or func in STRICT)]
    if not far or not near:
        return
    name = getattr(func, "__name__", str(func))
    if func in INDEXED:
        home = isinstance(args[0], OnDevice)
        index = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor) and t.ndim]
        if not home and any(isinstance(t, OnDevice) for t in index):
            raise RuntimeError(f"{name}: indices are on cuda:0 and the indexed tensor is not")
        value = args[2] if len(args) > 2 else None
        if (
            isinstance(value, Tensor)
            and value.ndim
            and isinstance(value, OnDevice) != home
            and index
        ):
            raise RuntimeError(f"{name}: a value on another device than the indexed tensor")
        return
    raise RuntimeError(
        f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
    )


def refuse_absent(func: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """What no GPU can do, or does only with a generator of its own."""
    name = getattr(func, "__name__", str(func))
    if func in ABSENT:
        raise RuntimeError(f"{name} is not implemented for cuda")
    if func in PRODUCTS and not any(t.is_floating_point() or t.is_complex() for t in tensors):
        raise RuntimeError(f"{name} is not implemented on cuda for {tensors[0].dtype}")
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


_counting: list[Counter[str]] = []


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """How often each line of stratoscope's own makes the host wait for the device: the lines whose
    call it was, not what torch and transformers do on their own account."""
    _counting.append(Counter())
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


def _waits(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    if not isinstance(args[0] if args else None, OnDevice):
        return False
    if func is Tensor.to:
        places = [
            x for x in (*args[1:], *kwargs.values()) if isinstance(x, (Tensor, str, torch.device))
        ]
        near = [
            not isinstance(x, OnDevice) if isinstance(x, Tensor) else torch.device(x).type == "cpu"
            for x in places
        ]
        return any(near)
    if func in INDEXED:
        return any(isinstance(t, OnDevice) and t.dtype == torch.bool for t in tree_leaves(args[1]))
    return func in WAITED


def _note_line() -> None:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and (home := next((h for h in HOMES if h in name), None)):
            if home == "/src/stratoscope/":
                _counting[-1][f"{name.rpartition(home)[2]}:{frame.f_lineno}"] += 1
            return
        frame = frame.f_back


class _Factories(TorchFunctionMode):
    """`device=cuda:0` makes a tensor of the device, also where no tensor takes part."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        to_there = func is Tensor.to and any(isinstance(a, OnDevice) for a in args[1:])
        named = func is Tensor.to and any(isinstance(a, (str, torch.device)) for a in args[1:])
        if (asked is not None and torch.device(asked).type == "cuda") or to_there or named:
            return run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def device(*models: nn.Module) -> Iterator[None]:
    """Inside the block the models' weights lie on the device; afterwards they are what they
    were."""
    before = [
        (m, dict(m._parameters), dict(m._buffers)) for model in models for m in model.modules()
    ]
    shared: dict[int, Any] = {}

    def move(x: Tensor | None) -> Any:
        if x is None:
            return None
        if id(x) not in shared:
            data = there(x.detach())
            shared[id(x)] = (
                nn.Parameter(data, x.requires_grad) if isinstance(x, nn.Parameter) else data
            )
        return shared[id(x)]

    tensors, weights._TENSORS = weights._TENSORS, (*weights._TENSORS, OnDevice)
    asked = {"mem_get_info": (2**34, 2**34), "get_device_capability": (0, 0)}
    before_it = {name: getattr(torch.cuda, name) for name in asked}
    for name, answer in asked.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    try:
        for module, parameters, buffers in before:
            module._parameters.update({k: move(v) for k, v in parameters.items()})
            module._buffers.update({k: move(v) for k, v in buffers.items()})
        with _Factories():
            yield
    finally:
        weights._TENSORS = tensors
        for name, own in before_it.items():
            setattr(torch.cuda, name, own)
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
