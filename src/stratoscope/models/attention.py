"""The attention seam: one function, registered with Transformers, through which every model's
attention can be seen.

Transformers sends most models' attention through `AttentionInterface`. While a `seam` is open, the
model's configs name our function, which computes what the eager kernel computes and hands q, k, v,
scores and pattern to the taps. Outside, the user's own kernel runs and the configs are
bit-identical to before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stratoscope.errors import FamilyError

NAME = "stratoscope"
_SDPA = "sdpa"
# fire(name, value) -> value, for the attention module that is running: q, k, v, scores or pattern
Fire = Callable[[str, Tensor], Tensor]
# attend(q, k, v, mask, scaling, softcap, sinks) -> z (example, position, head, head_dim), when
# someone (the sweep) computes attention its own way
_listeners: dict[nn.Module, list[Fire]] = {}  # outermost first
_replacements: dict[nn.Module, list[Callable[..., Tensor]]] = {}  # the last one counts
# configs by id, and the kernel outside, once for each open seam
_switched: dict[int, tuple[Any, list[Any]]] = {}
_overheard: dict[nn.Module, list[Callable[..., None]]] = {}
_beneath: list[Any] = []  # the kernel under `_listen`, and what the table itself held
_LOCK = Lock()
# arguments of other attention functions that change the result and that `attend` does not compute
_UNHANDLED = ("cache",)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """(example, kv_head, position, head_dim) -> (example, head, ...): query head h reads key/value
    head h // groups."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def scores_of(q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """q k^T * scaling, soft-capped; heads of k already repeated. (example, head, query, key)."""
    scores = (q @ k.transpose(-1, -2)) * scaling
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with Transformers' additive mask; what it hides becomes -inf, not merely very
    small."""
    if mask is None:
        return scores
    mask = mask[..., : scores.shape[-1]]
    return (scores + mask).masked_fill(mask <= torch.finfo(scores.dtype).min / 2, -torch.inf)


def looks_ahead(mask: Tensor | None) -> bool:
    """Whether a mask lets some query see a later key: a causal model does so for the tokens of a
    picture (Gemma 3)."""
    if mask is None or mask.shape[-1] != mask.shape[-2]:
        return False
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(shown.triu(1).any())


def softmax_visible(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over keys; a query that sees no key (padding, or all knocked out) reads nothing: its
    row is zero.

    sinks (broadcasts against scores, last axis 1): scores of a key that holds nothing, as GPT-OSS
    has one for each head: rows then sum to less than one.
    """
    # a score that is no number is seen: its row is none either
    seen = (scores != -torch.inf).any(dim=-1, keepdim=True)
    scores, kind = torch.where(seen, scores, 0.0), scores.dtype
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(kind).expand(*scores.shape[:-1], 1)], dim=-1)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return ((pattern if sinks is None else pattern[..., :-1]) * seen).to(kind)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers calls. query (example, head, position, head_dim) -> z (example, position,
    head, head_dim)."""
    unhandled = [name for name in _UNHANDLED if others.get(name) is not None]
    if unhandled:
        raise FamilyError(
            f"{type(module).__name__} passes {unhandled} to attention, which the seam does not "
            "compute."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def fire(point: str, x: Tensor) -> Tensor:
        for listener in _listeners.get(module, ()):
            x = listener(point, x)
        return x

    query, key, value = (
        fire(name, x.transpose(1, 2)).transpose(1, 2) for name, x in zip("qkv", (query, key, value))
    )
    if position_bias is not None and module in _replacements:
        # as a mask for each head, which is what those who attend their own way know of
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    if module in _replacements:
        return _replacements[module][-1](
            query, key, value, attention_mask, scaling, softcap, s_aux
        ), None
    groups = query.shape[1] // key.shape[1]
    scores = scores_of(query, repeat_heads(key, groups), scaling, softcap)
    scores = scores if position_bias is None else scores + position_bias  # T5's
    scores = masked(scores, attention_mask)
    sinks = None if s_aux is None else s_aux.reshape(1, -1, 1, 1)
    pattern = fire("pattern", softmax_visible(fire("scores", scores), sinks))
    dropped = nn.functional.dropout(pattern, p=dropout, training=module.training)
    z = dropped @ repeat_heads(value, groups)
    return z.transpose(1, 2).contiguous(), pattern


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


@contextmanager
def overheard(
    model: nn.Module, listeners: Mapping[nn.Module, Callable[..., None]]
) -> Iterator[bool]:
    """Tell what each attention is given while the user's own kernel computes it: listener(k, v,
    mask, causal), where without a mask `causal` says whether later keys are hidden.

    False, and nothing is told, where the kernel is another than torch's SDPA or a seam is open.
    """
    kernels = {config._attn_implementation_internal for config in configs_of(model)}
    if (
        not listeners
        or kernels != {_SDPA}
        or any(isinstance(kernel, _Kernel) for kernel in kernels)
    ):
        yield False
        return
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    with _LOCK:  # models of other threads may be overheard meanwhile, and end in any order
        if not _overheard:
            _beneath[:] = [ALL_ATTENTION_FUNCTIONS[_SDPA], local.get(_SDPA)]
            local[_SDPA] = _listen
        for module, tell in listeners.items():
            _overheard.setdefault(module, []).append(tell)
    try:
        yield True
    finally:
        with _LOCK:
            for module, tell in listeners.items():
                _take_away(_overheard, module, tell)
            if not _overheard:
                local.pop(_SDPA, None)
                if _beneath[1] is not None:
                    local[_SDPA] = _beneath[1]


def _listen(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,  # some families name it
    *rest: Any,
    **how: Any,
) -> Any:
    for tell in _overheard.get(module, ()):
        causal = how.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        bias = how.get("position_bias")
        tell(k, v, attention_mask if bias is None else bias, bool(causal) or q.shape[2] == 1)
    return _beneath[0](module, q, k, v, attention_mask, *rest, **how)


def configs_of(model: nn.Module) -> list[Any]:
    """Every distinct config object that some module of the model holds."""
    held = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config for config in held.values() if hasattr(config, "_attn_implementation_internal")]


@contextmanager
def seam(
    model: nn.Module,
    listeners: dict[nn.Module, Fire],
    replacements: dict[nn.Module, Callable[..., Tensor]] | None = None,
) -> Iterator[None]:
    """Route the model's attention through `_attend` inside the block; configs and tables are
    restored on any exit."""
    with ExitStack() as stack:
        for table, added in ((_listeners, listeners), (_replacements, replacements or {})):
            for module, call in added.items():
                table.setdefault(module, []).append(call)
                stack.callback(_take_away, table, module, call)
        for config in configs_of(model):
            _, outside = _switched.setdefault(id(config), (config, []))
            outside.append(outside[0] if outside else config._attn_implementation_internal)
            stack.callback(_switch_back, config)
            config._attn_implementation_internal = _Kernel(NAME, outside[0])
        yield


class _Kernel(str):
    """Our kernel's name while a seam is open. A copy of the config that is made meanwhile names the
    user's own."""

    outside: str | None

    def __new__(cls, name: str, outside: str | None) -> _Kernel:
        made = super().__new__(cls, name)
        made.outside = outside
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.outside


def _take_away(table: dict[nn.Module, list[Any]], module: nn.Module, call: Any) -> None:
    table[module] = [other for other in table[module] if other is not call]
    if not table[module]:
        del table[module]


def _switch_back(config: Any) -> None:
    """The last seam to close, in whatever order, gives the config its kernel back."""
    _, outside = _switched[id(config)]
    kernel = outside.pop()
    if not outside:
        del _switched[id(config)]
        config._attn_implementation_internal = kernel
