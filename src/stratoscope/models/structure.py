"""What a layer holds, known by the names of its modules: attention, another mixer of positions, an
MLP, experts.

Nothing here is trusted: `probe` measures what the parts found add to the stream, and `prove` proves
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

_QUERY = (
    "q_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "Wq",
    "q_b_proj",
    "query",
    "qkv",
)
_O_PROJ = ("o_proj", "out_proj", "dense", "c_proj", "proj", "wo", "Wo")
# a state space, a gated linear recurrence, a short convolution, RWKV's time mixing, lightning
# attention
_MIXER = ("conv1d", "conv", "conv_1d", "rg_lru", "time_shift", "output_gate", "mlstm_backend")
_CHOOSER = ("indexer",)
_DOWN = (
    "down_proj",
    "c_proj",
    "fc2",
    "dense_4h_to_h",
    "w2",
    "wo",
    "Wo",
    "fc_out",
    "output_linear",
    "proj_down",
)
# what the activation function takes comes first; a lone `up_proj` has no gate beside it
_PRE = (
    "gate_proj",
    "proj_up_gate",
    "c_fc",
    "fc1",
    "dense_h_to_4h",
    "w1",
    "fc_in",
    "gate_up_proj",
    "Wi",
    "input_linear",
    "up_proj",
)
FUSED = ("gate_up_proj", "Wi", "input_linear")
_ROUTER = ("gate", "router")
_EXPERTS = ("experts", "moe")


@dataclass(frozen=True)
class Part:
    """One thing that a layer adds to the stream. Paths start at the layer; "" is the layer itself.

    write: the projection that turns heads or neurons into what is added, "" where there is no such
    product. pre: the projection that the activation function takes. router: what chooses experts.
    """

    kind: Literal["attention", "mixer", "mlp", "experts"]
    path: str
    write: str = ""
    pre: str = ""
    router: str = ""
    chooses: bool = False  # attention that makes its own mask, from what it reads


def parts(layer: nn.Module) -> list[Part]:
    """The parts of a layer, in the order of its modules; an MLP whose projections stand in the
    layer itself last."""
    parts = [
        part for name, child in layer.named_children() for part in _within(child, name, depth=2)
    ]
    own = _mlp(layer, "")
    return [*parts, own] if own and not any(part.kind == "mlp" for part in parts) else parts


def _within(module: nn.Module, path: str, depth: int) -> list[Part]:
    part = (
        _experts(module, path)
        or _mixer(module, path)
        or _attention(module, path)
        or _mlp(module, path)
    )
    if part:
        return [part]
    inner = module.named_children() if depth > 1 else ()
    return [part for name, child in inner for part in _within(child, f"{path}.{name}", depth - 1)]


def _attention(module: nn.Module, path: str) -> Part | None:
    out = first(module, _O_PROJ)
    if not out or not first(module, _QUERY):
        return None
    return Part("attention", path, f"{path}.{out}", chooses=first(module, _CHOOSER) is not None)


def _mixer(module: nn.Module, path: str) -> Part | None:
    named = {*dict(module.named_children()), *dict(module.named_parameters(recurse=False))}
    return Part("mixer", path) if named & {*_MIXER} else None


def _experts(module: nn.Module, path: str) -> Part | None:
    router = first(module, _ROUTER)
    fused = router and first(module, ("input_linear",))
    if not (router and (fused or first(module, _EXPERTS))):
        return None
    return Part("experts", path, router=f"{path}.{router}")


def _mlp(module: nn.Module, path: str) -> Part | None:
    at = f"{path}." if path else ""
    if (
        isinstance(module, nn.Sequential)
        and len(module) == 3
        and not any(True for _ in module[1].parameters())
    ):
        return Part("mlp", path, f"{at}2", f"{at}0")
    down, pre = first(module, _DOWN), first(module, _PRE)
    return Part("mlp", path, at + down, at + pre) if down and pre else None


def first(module: nn.Module, names: Iterable[str]) -> str | None:
    """The first of some names that a module has a child under."""
    children = dict(module.named_children())
    return next((name for name in names if name in children), None)
