"""A family for an architecture that no file names: found in the structure of its layers, then to be
proved.

`structure` names the parts of each layer, `plain_run` measures what they add to the stream. All is
trusted only after `prove`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from stratoscope.errors import FamilyError
from stratoscope.models.families.bert_pre_norm import like_bert
from stratoscope.models.families.vlm import with_vision
from stratoscope.models.family import Family, Point, Tower, attention_points, into, out_of
from stratoscope.models.plain_run import Measured, PlainRun, measured
from stratoscope.models.sites import SEAM_POINTS
from stratoscope.models.structure import FUSED, Part, first, parts

_NORM = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "layernorm",
    "norm_f", "embedding_norm", "ln_out", "out_norm",
)  # fmt: skip
_HEAD = ("lm_head", "embed_out", "output_projection", "output", "cls", "decoder", "head")
_ACTIVATION = ("act_fn", "act", "activation_fn", "activation")
_ATTENTION_POINTS = (*sorted(SEAM_POINTS), "attn.z", "attn.out")
_OWN = (
    "its attention does not go through Transformers' attention interface, or joins its heads "
    "before z"
)
EXPERTS = (
    "a mixture of experts computes its neurons expert by expert, not as one product; read "
    "`mlp.router` or `mlp.out`"
)
_STATE_SPACE = ("ssm.in", "ssm.gate", "ssm.delta", "ssm.z")
_UNNAMED = "no file of `models/families/` names the inside of this layer's mixer; read `mix.out`"
_PARALLEL = "attention and MLP run in parallel on the same residual"
Changes = dict[str, Any]


def probe(model: nn.Module) -> list[Family]:
    """Candidate families, likeliest first. Raises FamilyError, saying what was looked for, when
    there is none."""
    named = like_bert(model)
    if named:
        return named
    base: Any = model.base_model
    path, stack = _stack(model, base)
    parent, prefix = (
        base.get_submodule(path.rpartition(".")[0]),
        f"{path.rpartition('.')[0]}." if "." in path else "",
    )
    table = base.get_input_embeddings()  # of the text, where a vision tower has tables of its own
    embed = next(
        (n for n, m in base.named_modules() if m is table and isinstance(m, nn.Embedding)), None
    )
    if embed is None:
        raise FamilyError(f"{type(model).__name__} has no token embedding: refused.")
    parts_of = [parts(layer) for layer in stack]
    if not all(parts_of):
        bare = stack[parts_of.index([])]
        raise FamilyError(
            f"{type(model).__name__} is an architecture no family names, and its layers "
            f"({type(bare).__name__}: "
            f"{', '.join(n for n, _ in bare.named_children())}) do not show an attention with an "
            "output projection "
            f"and an MLP with a down projection under names we know: refused."
        )
    seen = PlainRun(model, stack, parts_of)
    layers = [measured(seen, layer, number, parts_of[number]) for number, layer in enumerate(stack)]
    norm, head = first(parent, _NORM), first(model, _HEAD)
    tower = Tower(
        layers=path,
        embed=embed,
        final_norm=prefix + norm if norm else None,
        points={"resid_pre": into(""), "resid_post": out_of("")},
        attn_write=(),
        mlp_write=(),
        causal=seen.causal,
    )
    heads = (head,) if head else ()
    # ModernBERT's decoder: a transform, then the projection
    if head == "lm_head" and first(model, ("decoder",)):
        heads = ("lm_head", "decoder")
    scale = seen.logit_scale(tower.final_norm, heads)
    name = f"{model.config.model_type} (probed)"
    families = [
        Family(name, {"": t}, head=heads, logit_scale=scale) for t in _towers(tower, layers)
    ]
    return [with_vision(model.config, family) for family in families]


def _stack(model: nn.Module, base: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers: the heaviest list of modules that stands in no other list."""
    lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise FamilyError(
            f"{type(model).__name__}: no stack of equal layers was found, so no family can be "
            "guessed."
        )
    return max(outer, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


# --- from parts to a table ------------------------------------------------------------------------


def _towers(plain: Tower, layers: list[Measured]) -> list[Tower]:
    """The stack as one table with its kinds; which half of a fused projection is the gate, and what
    mixes, may be either."""
    every = [part for layer in layers for part in layer.parts]
    mixers = any(part.kind == "mixer" or part.chooses for part in every)
    fused = any(part.pre.endswith(FUSED) for part in every)
    options = product((0, 1) if fused else (0,), (True,) if mixers else (False, True))
    return [_joined(plain.but(mixes=mixes), layers, half) for half, mixes in options]


def _joined(plain: Tower, layers: list[Measured], half: int) -> Tower:
    """The table of the fullest layer, and the changes of every layer that differs, by a module that
    only such layers hold."""
    tables = [(_mixing(layer), _thinking(layer, half)) for layer in layers]
    full = max(
        range(len(layers)),
        key=lambda n: [any(p.kind == k for p in layers[n].parts) for k in ("attention", "mlp")],
    )
    kinds: dict[str, Changes] = {}
    for number, slots in enumerate(tables):
        for slot, changes in enumerate(slots):
            if changes != tables[full][slot]:
                marker = _marker(layers, tables, number, slot)
                kinds[marker] = _merged(kinds.get(marker, {}), changes)
    parallel = {layer.parallel for layer in layers if len(layer.parts) > 1}
    if len(parallel) > 1:
        raise FamilyError(
            "some layers run attention and MLP in parallel, others one after the other: refused."
        )
    changes = _merged(*tables[full]) | {
        "residual": "parallel" if True in parallel else "sequential"
    }
    scales = {layer.stream for layer in layers}
    if scales != {None}:
        changes |= {"residual": "post-norm", "norms": ("", *scales)}
    return plain.but(kinds=kinds, **changes)


def _marker(
    layers: list[Measured], tables: list[tuple[Changes, Changes]], number: int, slot: int
) -> str:
    """A path that layer `number` holds, and with it only layers of the same table in this slot."""
    mine = [
        p for p in layers[number].parts if (p.kind in ("mlp", "experts")) == bool(slot)
    ] or layers[number].parts
    inner = [n for n, _ in layers[number].layer.named_modules() if n]
    near = sorted(
        inner, key=lambda n: (not any(f"{n}.".startswith(f"{p.path}.") for p in mine), n.count("."))
    )
    for path in near:
        holders = [n for n, layer in enumerate(layers) if _holds(layer.layer, path)]
        if all(tables[n][slot] == tables[number][slot] for n in holders):
            return path
    raise FamilyError(
        f"layer {number} differs from others in no module that tells them apart: refused."
    )


def _holds(layer: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Changes:
    return {
        k: {**one[k], **v} if k in one and isinstance(v, dict) else v
        for k, v in {**one, **other}.items()
    }


def _mixing(layer: Measured) -> Changes:
    """The points of what mixes positions in a layer: attention, another mixer, both side by side,
    or nothing."""
    mixers = [
        (p, out) for p, out in zip(layer.parts, layer.outs) if p.kind in ("attention", "mixer")
    ]
    points, lacks, write = {}, {}, ()
    if len({part.kind for part, _ in mixers}) < len(mixers):
        every = ", ".join(f"`{part.path}`" for part, _ in mixers)
        raise FamilyError(
            f"{type(layer.layer).__name__}: {every} mix positions side by side: refused."
        )
    for part, out in mixers:
        if part.kind == "mixer":
            points["mix.out"] = out
            lacks |= dict.fromkeys(_STATE_SPACE, _UNNAMED)
            continue
        seam = attention_points(part.path, part.write)
        points |= ({"attn.z": seam["attn.z"]} if layer.seam == "closed" else seam) | {
            "attn.out": out
        }
        lacks |= dict.fromkeys(SEAM_POINTS, _OWN) if layer.seam == "closed" else {}
        write = _write(part, out)
    if "attn.out" not in points:
        what = type(layer.layer.get_submodule(mixers[0][0].path)).__name__ if mixers else ""
        reason = (
            f"this layer is a {what}, not attention; read `mix.out`"
            if mixers
            else "this layer mixes no positions"
        )
        lacks |= dict.fromkeys(_ATTENTION_POINTS, reason)
    if "mix.out" not in points:
        lacks["mix.out"] = (
            "this layer mixes positions by attention alone; read `attn.out`"
            if mixers
            else "this layer mixes no positions"
        )
    middle = len(mixers) == 1 and len(layer.parts) == 2 and not layer.parallel
    if middle:
        points["resid_mid"] = Point("", "sum")
    else:
        side = (
            "attention and another mixer write side by side"
            if len(mixers) > 1
            else "this layer adds to the stream once"
        )
        lacks["resid_mid"] = _PARALLEL if layer.parallel else side
    return {"points": points, "lacks": lacks, "attn_write": write, "gated": layer.seam == "gated"}


def _thinking(layer: Measured, half: int) -> Changes:
    """The points of a layer's MLP or experts, or of neither."""
    writers = [(p, out) for p, out in zip(layer.parts, layer.outs) if p.kind in ("mlp", "experts")]
    none = {"mlp_write": (), "activation": None}
    if not writers:
        return none | {
            "points": {},
            "lacks": dict.fromkeys(
                ("mlp.pre", "mlp.act", "mlp.out", "mlp.router"), "this layer has no MLP"
            ),
        }
    if len(writers) > 1:
        names = " and ".join(f"`{part.path}`" for part, _ in writers)
        raise FamilyError(
            f"{type(layer.layer).__name__}: {names} write side by side, and no module gives their "
            "sum: refused."
        )
    [(part, out)] = writers
    if part.kind == "experts":
        points = {"mlp.router": out_of(part.router), "mlp.out": out}
        return none | {"points": points, "lacks": {"mlp.pre": EXPERTS, "mlp.act": EXPERTS}}
    pre = out_of(part.pre, part=(half, 2) if part.pre.endswith(FUSED) else None)
    points = {"mlp.pre": pre, "mlp.act": into(part.write), "mlp.out": out}
    lacks = {"mlp.router": "this layer has no experts to choose from"}
    return {
        "points": points,
        "lacks": lacks,
        "mlp_write": _write(part, out),
        "activation": _open(layer.layer, part),
    }


def _write(part: Part, out: Point) -> tuple[str, ...]:
    """The projection, then the post-norm and the factor that stand between it and the stream."""
    post = () if out.path in (part.path, part.write) else (out.path,)
    return (part.write, *post, *((out.scale,) if out.scale else ()))


@torch.no_grad()
def _open(layer: nn.Module, part: Part) -> str | None:
    """The path of an activation that does not shut far below zero, or None."""
    owner: Any = layer.get_submodule(part.path)
    name = first(owner, _ACTIVATION)
    if name is None or isinstance(owner, nn.Sequential):
        return None
    far = torch.full(
        (1, 1, 1),
        -100.0,
        device=next(layer.parameters()).device,
        dtype=next(layer.parameters()).dtype,
    )
    return (
        None
        if bool(owner.get_submodule(name)(far).abs().max() < 1e-3)
        else f"{part.path}.{name}".lstrip(".")
    )
