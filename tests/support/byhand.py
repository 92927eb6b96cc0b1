"""Edges by plain PyTorch hooks on plain Hugging Face models: slow, and independent of the package.

A grouped-query model is first widened: its key and value weights are repeated until every query
head has its own. That is the same function, and in it "the keys as query head 2 reads them" is
simply a slice of what k_proj gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from support import tiny


class Parts(NamedTuple):
    """Where Hugging Face keeps what is hooked. projection(side), start(head, side): whose output
    holds q, k or v of a head, and from where on."""

    layers: nn.ModuleList
    final: nn.Module
    before_attention: str
    before_mlp: str
    out: str
    post_attention: str | None
    mlp: str
    projection: Callable[[str], str]
    start: Callable[[int, str], int]
    heads: int
    head_dim: int


def parts(name: str, model: Any) -> Parts:
    """The table for one of llama, gemma2, phi3, gpt2, gpt_neox."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    table: dict[str, Any] = {"post_attention": None, "mlp": "mlp", "heads": heads, "head_dim": size}
    if name == "gpt2":
        base = model.transformer
        table |= {
            "before_attention": "ln_1",
            "before_mlp": "ln_2",
            "out": "attn.c_proj",
            "final": base.ln_f,
        }
        table |= {
            "projection": lambda s: "attn.c_attn",
            "start": lambda h, s: ("qkv".index(s) * heads + h) * size,
        }
        return Parts(layers=base.h, **table)
    if name == "gpt_neox":
        base = model.gpt_neox
        table |= {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
        table |= {"out": "attention.dense", "final": base.final_layer_norm}
        table |= {"projection": lambda s: "attention.query_key_value"}
        return Parts(
            layers=base.layers, start=lambda h, s: (3 * h + "qkv".index(s)) * size, **table
        )
    table |= {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
    table |= {"out": "self_attn.o_proj", "final": model.model.norm}
    table |= {"projection": lambda s: f"self_attn.{s}_proj", "start": lambda h, s: h * size}
    if name == "phi3":
        table |= {"projection": lambda s: "self_attn.qkv_proj"}
        table |= {"start": lambda h, s: ("qkv".index(s) * heads + h) * size}
    if name == "gemma2":
        table |= {"post_attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
        table |= {"before_mlp": "pre_feedforward_layernorm"}
    return Parts(layers=model.model.layers, **table)


@torch.no_grad()
def widened(name: str) -> Any:
    """tiny.model(name) in which every query head has its own key and value weights, on the eager
    kernel."""
    model = tiny.model(name)
    config = copy.deepcopy(model.config)
    heads, few = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    if few != heads:
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_key_value_heads = heads
        weights = model.state_dict()

        def repeat(w: Tensor) -> Tensor:
            return w.unflatten(0, (few, size)).repeat_interleave(heads // few, 0).flatten(0, 1)

        for key, w in weights.items():
            if key.endswith((".k_proj.weight", ".v_proj.weight")):
                weights[key] = repeat(w)
            elif key.endswith("qkv_proj.weight"):
                q, k, v = w.split([heads * size, few * size, few * size])
                weights[key] = torch.cat([q, repeat(k), repeat(v)])
        wide = type(model)(config).eval()
        wide.load_state_dict(weights)
        model = wide
    model.set_attn_implementation("eager")
    return model


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable, bool]) -> Iterator[None]:
    """Hooks (module, function, whether before it) for the length of a block."""
    handles = [
        m.register_forward_pre_hook(f) if pre else m.register_forward_hook(f) for m, f, pre in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sent(p: Parts, model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What each sender adds to the stream, (1, position, dim), less biases that both prompts
    share."""
    found: dict[str, Tensor] = {}

    def heads(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            zero = type(module).forward(module, torch.zeros_like(args[0]))
            scale: Any = 1.0
            if p.post_attention:  # Gemma's norm, its scale held: weight is stored less one
                norm = p.layers[layer].get_submodule(p.post_attention)
                scale = (1 + norm.weight) * torch.rsqrt(
                    output.pow(2).mean(-1, keepdim=True) + norm.eps
                )
            for head in range(p.heads):
                only = torch.zeros_like(args[0])
                here = slice(head * p.head_dim, (head + 1) * p.head_dim)
                only[..., here] = args[0][..., here]
                found[f"L{layer}H{head}"] = (type(module).forward(module, only) - zero) * scale

        return hook

    pairs: list[tuple[nn.Module, Callable, bool]] = [
        (p.layers[0], lambda m, args: found.update(embed=args[0]), True),
    ]
    for n, layer in enumerate(p.layers):
        pairs.append((layer.get_submodule(p.out), heads(n), False))
        pairs.append(
            (
                layer.get_submodule(p.mlp),
                lambda m, args, out, n=n: found.update({f"L{n} mlp": out}),
                False,
            )
        )
    with hooked(*pairs):
        model(ids)
    return found


def receiving(p: Parts, receiver: str, change: Tensor) -> list[tuple[nn.Module, Callable, bool]]:
    """Hooks with which this receiver alone reads the stream with `change` added."""

    def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + change,)

    if receiver == "logits":
        return [(p.final, add, True)]
    layer = p.layers[int(receiver[1])]
    if receiver.endswith("mlp"):
        return [(layer.get_submodule(p.before_mlp), add, True)]
    head, side = int(receiver[3]), receiver[-1]
    norm, projection = (
        layer.get_submodule(p.before_attention),
        layer.get_submodule(p.projection(side)),
    )
    begin = p.start(head, side)
    here, stream = slice(begin, begin + p.head_dim), {}

    def replace(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        changed = type(norm).forward(norm, stream["in"] + change)
        output[..., here] = type(module).forward(module, changed)[..., here]
        return output

    return [
        (norm, lambda m, args: stream.update({"in": args[0]}), True),
        (projection, replace, False),
    ]


@torch.no_grad()
def with_edges(p: Parts, model: Any, ids: Tensor, changes: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Last logits with each (receiver, change) made: (vocab,)."""
    with hooked(*(pair for receiver, change in changes for pair in receiving(p, receiver, change))):
        return model(ids).logits[0, -1]
